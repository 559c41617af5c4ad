"""``DatasetChatEnv``: conversations whose first message comes from a dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torchrl.data import Composite
from torchrl.envs import EnvBase, TransformedEnv

from torchrl_chat.envs.chat import ChatEnv, ChatOptions
from torchrl_chat.envs.dataloaders import LoaderEpisodes
from torchrl_chat.envs.loading import RowPrimer, dataset_episodes
from torchrl_chat.envs.ray_episodes import RayEpisodes
from torchrl_chat.envs.transforming import TransformedChatEnv
from torchrl_chat.seeds import EPISODE_KEYS


class EpisodeOptions(ChatOptions, total=False):
    """What :class:`DatasetChatEnv` takes wherever its rows come from; it documents them."""

    seed: int | None
    repeats: int | None
    group_repeats: bool
    primers: Composite | None
    ray_backend: bool
    dataloader_actor_name: str | None


class DatasetChatEnv(TransformedChatEnv):
    """:class:`ChatEnv` with a primer that draws a row of a dataset for every conversation.

    The columns of the dataset become entries of the TensorDict, ``data_key`` (``"query"``) being the
    first user message (a string, or a list of messages). The others (``"answer"``, say) stay beside the
    conversation for rewards to read.

    Keyword Args:
        dataset: a hub name, a local folder, JSON, JSONL, Parquet or CSV files, a list of rows, or a ``datasets.Dataset``; see
            :func:`~torchrl_chat.envs.loading.load_rows`. Rows may differ in their keys, and a key in its type: a row has
            ``None`` in the columns that it lacks.
        shuffle: whether rows come in random order. Defaults to ``True``.
        name, split: the configuration and the split; ``"train"`` where there is one.
        num_envs: the number of conversations (of different rows, with ``group_repeats``).
        repeats: how many conversations each row is used for (the group size of GRPO).
        batch_size_dl: how many rows are read from the dataset at a time.
        seed: of the order of rows, which is another one in each epoch, and of the episodes. Random if ``None``.
        group_repeats: whether all repeats of a row are in the same batch: the batch size is then
            ``num_envs * repeats``, each row standing ``repeats`` times in a row.
        apply_template: accepted for torchrl's sake; the template is applied wherever there is a tokenizer.
        collate_fn: rows to columns, a list of dicts to a dict of lists.
        primers: specs of the columns, if they are not to be inferred from the first row.
        ray_backend, dataloader_actor_name: draw the episodes from a Ray actor, which environments that give the same name
            share (extra ``ray``).
        shard: ``(index, count)``, for several workers with one seed: worker ``index`` plays the rows ``index``,
            ``index + count`` ... of the order that one worker alone would play, each with all its repeats.

    The others are as for :class:`ChatEnv` (``tokenizer``, ``input_mode``, ``system_prompt`` ...).

    **Episodes.** All environments of one dataset, seed, ``repeats`` and shard play the same endless sequence of episodes
    in the same order (rows of the batch that start together: the first row first), whatever ``num_envs`` is and whichever
    conversations end first: each epoch's rows in its order, each row ``repeats`` times. Four columns, int64 of shape (B,),
    tell which: ``"episode_row"`` (the row's number in the dataset), ``"episode_epoch"``, ``"episode_place"`` (0 to
    ``repeats - 1``) and ``"episode_seed"``, which depends on these three and the environment's seed only. A
    dataset with columns of these names is refused.

    **State.** ``state_dict()`` is where the sequence is (a few numbers, and a hash of JSONL files and lists, so that it is not
    loaded over other rows), and what the transforms keep;
    :func:`~torchrl_chat.envs.state.compact` makes the conversations in flight, which travel in the TensorDict, ready for
    ``torch.save``. An environment that loads the state goes on with the next episode, one that was pickled too.

    Raises:
        DatasetError: the dataset cannot be opened.
        ValueError: an option has no such value, or a column has the name of an entry of the environment.

    Example:
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> rows = [{"query": "2 + 2?", "answer": "4"}, {"query": "3 + 3?", "answer": "6"}]
        >>> env = DatasetChatEnv(dataset=rows, tokenizer=tokenizer, input_mode="text", num_envs=4, repeats=2)
        >>> td = env.reset()
        >>> sorted(td["query"])
        ['2 + 2?', '2 + 2?', '3 + 3?', '3 + 3?']
    """

    SYSTEM_PROMPT: str | None = None

    def __init__(
        self,
        *,
        dataset: Any,
        shuffle: bool = True,
        name: str | None = None,
        split: str | Sequence[str] | None = None,
        num_envs: int = 1,
        batch_size_dl: int = 1,
        apply_template: bool | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        shard: tuple[int, int] = (0, 1),
        **options: Unpack[EpisodeOptions],
    ):
        self._build(
            functools.partial(
                dataset_episodes,
                dataset,
                name,
                split,
                batch_size=batch_size_dl,
                shuffle=shuffle,
                shard=shard,
                collate_fn=collate_fn,
            ),
            num_envs,
            **options,
        )

    @classmethod
    def from_dataloader(
        cls,
        dataloader: Any,
        *,
        batch_size: int | tuple[int, ...] | torch.Size | None = None,
        **options: Unpack[EpisodeOptions],
    ) -> DatasetChatEnv:
        """The environment over an existing dataloader.

        Args:
            dataloader: an iterable of batches (mappings of columns, lists of rows, or TensorDicts), started
                again when it ends. What its state needs is told by
                :class:`~torchrl_chat.envs.dataloaders.LoaderEpisodes`.

        Keyword Args:
            batch_size: the number of conversations (as ``num_envs``). Defaults to ``(1,)``.
            seed: of the episodes. The order of the rows is the loader's own.

        The others are as for the class.
        """
        self = cls.__new__(cls)
        self._build(functools.partial(LoaderEpisodes, dataloader), batch_size, **options)
        return self

    def _build(
        self,
        episodes: Callable[..., Any],
        batch_size: int | tuple[int, ...] | torch.Size | None,
        *,
        seed: int | None = None,
        repeats: int | None = None,
        group_repeats: bool = False,
        primers: Composite | None = None,
        ray_backend: bool = False,
        dataloader_actor_name: str | None = None,
        **chat: Unpack[ChatOptions],
    ) -> None:
        if unknown := sorted(chat.keys() - ChatOptions.__annotations__.keys()):
            raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {unknown[0]!r}.")
        size = torch.Size(
            [1] if batch_size is None else [batch_size] if isinstance(batch_size, int) else batch_size
        )
        if len(size) != 1:
            raise ValueError(f"{type(self).__name__} has one batch dimension, got batch_size={tuple(size)}.")
        if repeats is not None and repeats < 1:
            raise ValueError(f"repeats is {repeats}: expected a positive number, or None.")
        if group_repeats and repeats:
            size = torch.Size([size[0] * repeats])
        if not ray_backend and dataloader_actor_name is not None:
            raise ValueError("dataloader_actor_name is given without ray_backend=True.")
        device = None if chat.get("device") is None else torch.device(chat["device"])  # type: ignore[arg-type]
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        factory = functools.partial(episodes, seed=seed, repeats=repeats or 1)
        rows: Any = RayEpisodes(factory, dataloader_actor_name) if ray_backend else factory()
        primer = self._primer(rows, primers=primers, batch_size=size, device=device)
        if chat.get("system_prompt") is None:
            chat["system_prompt"] = self.SYSTEM_PROMPT
        base = ChatEnv(batch_size=size, **chat)
        if base.data_key not in primer.primers.keys():
            raise KeyError(
                f"the dataset has no column {base.data_key!r} to start a conversation from: it has "
                f"{sorted(set(map(str, primer.primers.keys())) - set(EPISODE_KEYS))}. Pass data_key=..., or a collate_fn that renames one."
            )
        taken = set(base.observation_spec.keys()) | {"done", "terminated", "truncated", "reward", "next"}
        if clash := sorted(taken & set(primer.primers.keys())):
            raise ValueError(
                f"the dataset has the column(s) {clash}, which are entries of the environment itself: rename them with a "
                f"collate_fn."
            )
        TransformedEnv.__init__(self, base, primer)

    def _primer(self, episodes: Any, **kwargs: Any) -> RowPrimer:
        """The transform that loads the rows, made while the environment is built."""
        return RowPrimer(episodes, **kwargs)

    @property
    def primer(self) -> Any:
        """The transform that loads the rows."""
        transform = self.transform
        return transform[0] if hasattr(transform, "__getitem__") else transform

    def reset_dataloader(self) -> DatasetChatEnv:
        """Start from the first row of the dataset again, in the order of the seed.

        Returns:
            the environment itself.

        Raises:
            DatasetError: the rows come from an iterator, which can be read only once.
        """
        self.primer.reset_dataloader()
        return self

    def set_seed(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """Seed the episodes, and the order of the rows; the dataset starts anew.

        An existing dataloader keeps its own order, and goes on: the seed is that of its next episodes.
        """
        if seed is not None:
            self.primer.episodes.reseed(seed)
        return EnvBase.set_seed(self.base_env, seed, static_seed)


ChatEnv.dataset_env = DatasetChatEnv
OPTIONS = frozenset(
    {"dataset", *DatasetChatEnv.__init__.__kwdefaults__, *EpisodeOptions.__annotations__}  # type: ignore[misc]
)
"""The keyword arguments of :class:`DatasetChatEnv`, for environments with further ones of their own."""
LOADER_OPTIONS = frozenset({"batch_size", *EpisodeOptions.__annotations__})
"""Those of :meth:`DatasetChatEnv.from_dataloader`."""
