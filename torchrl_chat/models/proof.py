"""The proof of a model: in which ways rows may go through it together, so that it computes what it computes of each alone.

What a causal language model says of a row is what it says of the row by itself: ``model(input_ids=row[None])``. Everything
else is a way to say it faster, and none of them is right for all architectures: padding on the left moves what counts
columns and leaks into states, position ids are ignored or counted otherwise, caches are kept under other names, or not at all,
and rows that are packed one behind the other see each other. None of that raises, and none of it shows in a loss.

So a model is tried where it is first used, on a few short rows of its own ids, in the mode it is used in (``eval()``, and for
what is scored with gradients the caller's as well): each row alone against the ways that are asked for, the cheapest first,
through the very functions that run afterwards. The first right one is taken; where there is none, the model is refused by
name, with what was measured. The record belongs to the model object and outlives changes of its weights, but not of its
dtype, device, attention kernel, compilation or adapters.

What only long rows show (windows, chunks, states that are compressed block by block), or only weights that have learned
something, is tried as well on a small random copy of the same class, in float32, whose windows are a few tokens wide
(:mod:`~torchrl_chat.models.small`): once for a class and config. Ropes that change with the length are
:mod:`~torchrl_chat.models.ropes`'.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from torchrl_chat.models.head import Head
from torchrl_chat.models.mode import evaluating
from torchrl_chat.models.passes import (
    Decoding,
    ModelError,
    Together,
    float_type,
    groups_of,
    packed_pass,
    tree_pass,
    whole_pass,
)
from torchrl_chat.models.small import STRETCH, least_stretch, plain_class, small_copy
from torchrl_chat.models.token_scores import token_scores

LIMIT = 1e-3
"""Nats that a log-prob may differ by in float32; the rounding of real models is a tenth of that."""
# In lower precision: so many times the spacing of its numbers, or what equal work in another order differs by; never more.
_LEAST, _ROUNDING, _MOST = 8.0, 4.0, 0.5
_MORE = 3  # ids that follow, one by one
_LENGTHS, _LONG, _WITHIN = (9, 2, 5), (5 * STRETCH, 3, 2 * STRETCH + 5), (STRETCH - _MORE, 2, 3)


@dataclass(frozen=True, slots=True)
class Check:
    """One way for rows to go through a model, beside each row alone."""

    difference: float
    """The largest difference of a log-prob, in nats; infinite where the model raised, or gave no number."""
    error: str = ""
    """What it raised."""

    def __str__(self) -> str:
        return self.error or f"{self.difference:.2g} nats off"


class Packing(NamedTuple):
    """How sequences are told apart that are packed into one row."""

    manner: str
    """See :func:`~torchrl_chat.models.passes.packed_pass`."""
    together: Together
    """Which rows may go together."""

    def __str__(self) -> str:
        return self.manner if self.together == "padded" else f"{self.manner}, row by row"


@dataclass
class Proof:
    """What was tried of one model. Everything is tried when it is first asked for.

    Attributes:
        name: the model's class.
        limit: nats that a difference may have, in the model's precision.
        checks: what was tried, by its name.
        random: by how many nats two passes over the same rows differ in ``train()``, with dropout say; ``None``: not tried.
    """

    name: str
    limit: float
    checks: dict[str, Check] = field(default_factory=dict)
    random: float | None = None

    def holds(self, name: str, measure: Callable[[], float]) -> bool:
        """Whether a way is right; measured once."""
        if name not in self.checks:
            try:
                self.checks[name] = Check(measure())
            except torch.OutOfMemoryError:  # of the moment
                raise
            except Exception as error:  # whatever a model raises, it is no way for its rows
                said = str(error).partition("\n")[0]
                self.checks[name] = Check(float("inf"), f"{type(error).__name__}: {said:.200}")
        return self.checks[name].difference <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """What was tried, by name: the difference in nats, or what the model raised."""
        return {name: check.error or check.difference for name, check in self.checks.items()}

    def refused(self, what: str, names: Sequence[str]) -> ModelError:
        """Why none of these ways is right."""
        tried = "; ".join(f"{name}: {self.checks[name]}" for name in names)
        return ModelError(f"{self.name}: {what} as the model computes it for one row alone. Tried were {tried}.")


@dataclass(frozen=True)
class Prover:
    """Tries a model's ways on rows of its own.

    Args:
        model: the model.
        proof: where what was found is kept.
        rows: some ids with :data:`_MORE` behind them, int64 (T,) each.
        small: tries a small copy of the model, on longer rows; ``None`` for that copy itself, and where there is none.
        longest: tokens of the longest rows that it is right for; ``None`` for all.
        training: whether rows are scored in ``train()``, and every way is tried in that mode, too.
    """

    model: Any
    proof: Proof
    rows: list[torch.Tensor]
    small: Prover | None = None
    longest: int | None = None
    training: bool = False

    def check_length(self, length: int) -> None:
        """Refuse rows of so many tokens, if they have no log-probs of their own.

        Raises:
            ModelError: what the model says of a token in them depends on how many follow.
        """
        if self.longest is not None and length > self.longest:
            raise ModelError(
                f"{self.proof.name}: in rows of more than {self.longest} tokens (its shortest window) what it says of a token depends "
                f"on those behind it, as a small copy of it shows: a row of {length} tokens has no log-probs of its own. Keep rows "
                f"within {self.longest} tokens (max_context=, max_new_tokens=)."
            )

    def sampling(self) -> tuple[Together, bool]:
        """How rows are sampled from: which together, and whether with a cache."""
        ways: list[tuple[Together, bool]] = [("padded", True), ("equal", True), ("alone", True), ("equal", False)]
        for way, cached in [*ways, ("alone", False)]:
            name = f"sampling, {_SAID[way]}" + ("" if cached else ", without a cache")
            if self._holds(name, Prover._continued, way, cached):
                return way, cached
        raise self.proof.refused(
            "it cannot be sampled from", [n for n in self.proof.checks if n.startswith("sampling")]
        )

    def scoring(self) -> Together:
        """Which rows are scored together, padded on the right."""
        ways: list[Together] = ["padded", "equal"]
        for way in ways:
            if self._holds(f"scoring, {_SAID[way]}", Prover._whole, way):
                return way
        return "alone"

    def packing(self) -> Packing | None:
        """How sequences are told apart that are packed into one row; ``None`` where the model cannot."""
        ways = [Packing(manner, "padded") for manner in ("positions", "mask", "masks")]
        # Kernels of packed rows take one at a time.
        for way in (*ways, Packing("positions", "alone")):
            # A mask of ours takes the place of the model's own, which may look at a stretch only: short rows do not show it.
            if way.manner != "positions" and self.small is None:
                continue
            if self._holds(f"packing, told apart by {way}", Prover._packed, way):
                return way
        return None

    def sharing(self) -> str | None:
        """How sequences that begin alike share what they begin with; ``None`` where the model cannot."""
        for name in ("mask", "masks"):
            if self.small is not None and self._holds(f"sharing, by {name}", Prover._shared, name):
                return name
        return None

    def chunking(self) -> bool:
        """Whether the output head may see some hidden states at a time, the model's body left out."""
        return self.small is not None and self._holds("head, some states at a time", Prover._chunked)

    def tried(self, what: str) -> str:
        """What was measured of some ways."""
        return (
            "; ".join(f"{name}: {check}" for name, check in self.proof.checks.items() if name.startswith(what))
            or "nothing"
        )

    def record(self) -> dict[str, Any]:
        """Everything that can be asked of the model, tried: as plain data with one JSON form.

        ``"sampling"`` and ``"scoring"`` say which rows go together (``None`` where it is refused), ``"packing"`` and ``"sharing"``
        what tells sequences apart (``None``: they are taken apart), ``"chunking"`` whether the output head sees some states at a
        time, ``"longest"`` how many tokens a row may have (``None``: any number), ``"checks"`` the largest difference in nats of
        each way that was tried, and ``"small_copy"`` those of the small copy; of a model in ``train()``, in that mode, too, unless
        ``"random"``, by how much two passes differ there, is beyond the limit. ``"rounding"`` is how far log-probs are from those
        of the same weights in float32, of which a copy is made: importance ratios between a sampler and a learner of other
        precisions are off by as much before anything is learned.
        """
        try:
            way, cached = self.sampling()
            sampling: str | None = _SAID[way] + ("" if cached else ", without a cache")
        except ModelError:
            sampling = None
        found = {
            "sampling": sampling,
            "scoring": _SAID[self.scoring()],
            "packing": None if (packing := self.packing()) is None else str(packing),
            "sharing": self.sharing(),
            "chunking": self.chunking(),
        }
        return {
            "class": self.proof.name,
            "longest": self.longest,
            "dtype": str(float_type(self.model)).removeprefix("torch."),
            "kernel": getattr(getattr(self.model, "config", None), "_attn_implementation", None),
            "limit": self.proof.limit,
            "rounding": self._rounding(),
            "random": self.proof.random,
            **found,
            "checks": self.proof.as_dict(),
            "small_copy": None if self.small is None else self.small.proof.as_dict(),
        }

    # ------------------------------------------------------------------ trying
    def _holds(self, name: str, measure: Callable[..., float], *given: Any) -> bool:
        """Whether a way is right, by a method that measures it: of this model and of its small copy, in every mode that counts."""
        for training in (False, True) if self.training and not name.startswith("sampling") else (False,):
            tried = f"{name}, in train()" if training else name
            for prover in (self, self.small):
                if prover is not None and not prover._right(tried, training, measure, *given):
                    self.proof.checks[tried] = prover.proof.checks[tried]
                    return False
        return True

    def _right(self, name: str, training: bool, measure: Callable[..., float], *given: Any) -> bool:
        if name in self.proof.checks:
            return self.proof.checks[name].difference <= self.proof.limit
        if training and self._draws:
            return True
        with _by_itself(self.model), _training(self.model) if training else evaluating(self.model):
            if training and self.proof.random is None:
                self.proof.random = max(map(_difference, self.alone(self.rows), self.alone(self.rows)))
            if training and self._draws:
                return True
            return self.proof.holds(name, lambda: measure(self, *given))

    @property
    def _draws(self) -> bool:
        """Whether no two passes in ``train()`` are alike (dropout), so that ``eval()`` alone can tell."""
        return self.proof.random is not None and self.proof.random > self.proof.limit

    def _rounding(self) -> float:
        if float_type(self.model) in (torch.float32, torch.float64):
            return 0.0
        with _by_itself(self.model), evaluating(self.model):
            own = self.alone(self.rows)
            copied = copy.deepcopy(self.model).float()
            for part in copied.modules():
                if hasattr(type(part), "computes_in"):
                    part.__class__ = plain_class(part)
            exact = replace(self, model=copied).alone(self.rows)
        return max(map(_difference, own, exact))

    def alone(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Log-probs of each row by itself, float32 (T, V): not kept, since weights change between two checks."""
        return [_log_probs(self.model(input_ids=row[None], use_cache=False).logits[0]) for row in rows]

    def _continued(self, way: Together, cached: bool) -> float:
        worst = 0.0
        for rows, alone in self._batches(way):
            run = Decoding(self.model, [row[:-_MORE] for row in rows], padded=way == "padded", cached=cached)
            for step in range(_MORE + 1):
                at = [len(row) - _MORE - 1 + step for row in rows]
                worst = max(
                    worst, *map(_difference, _log_probs(run.logits), [a[i] for a, i in zip(alone, at, strict=True)])
                )
                if step < _MORE:
                    run.push(torch.stack([row[i + 1] for row, i in zip(rows, at, strict=True)]))
        return worst

    def _whole(self, way: Together) -> float:
        worst = 0.0
        for rows, alone in self._batches(way):
            logits = _log_probs(whole_pass(self.model, rows, padded=way == "padded").logits)
            worst = max(worst, *(_difference(found[: len(a)], a) for found, a in zip(logits, alone, strict=True)))
        return worst

    def _packed(self, way: Packing) -> float:
        """Two rows of the same sequences, in either order."""
        alone, worst = self.alone(self.rows), 0.0
        numbers = range(len(self.rows))
        orders = [[*numbers], [*reversed(numbers)]]
        ids = torch.stack([torch.cat([self.rows[i] for i in order]) for order in orders])
        positions = [torch.cat([torch.arange(len(self.rows[i])) for i in order]) for order in orders]
        places = torch.stack(positions).to(ids.device)
        for rows in groups_of([ids.shape[1]] * len(orders), way.together):
            logits = _log_probs(packed_pass(self.model, ids[rows], places[rows], way.manner).logits)
            for row, found in zip(rows, logits, strict=True):
                worst = max(worst, _difference(found, torch.cat([alone[i] for i in orders[row]])))
        return worst

    def _shared(self, manner: str) -> float:
        """Two sequences that begin alike, and one that is all of one of them but its end."""
        one = max(self.rows, key=len)
        half, end = len(one) // 2, len(one)
        other = torch.cat((one[:half], one[half:].flip(0)))
        tree, count = torch.cat((one, other[half:])), 2 * end - half
        positions = torch.cat((torch.arange(end), torch.arange(half, end))).to(tree.device)
        ends = torch.tensor([count] * half + [end] * (end - half) + [count] * (end - half), device=tree.device)
        # Two rows, as a view may have them.
        ids, positions, ends = (field.expand(2, -1) for field in (tree, positions, ends))
        logits = _log_probs(tree_pass(self.model, ids, positions, ends, manner).logits)
        first, second = self.alone([one, other])
        return max(max(_difference(row[:end], first), _difference(row[end:], second[half:])) for row in logits)

    def _chunked(self) -> float:
        row, head = max(self.rows, key=len), Head(self.model)
        targets, before = row[1:], (0, slice(None, -1))

        def chunked() -> torch.Tensor:
            with head.held_back(before) as seen:
                self.model(input_ids=row[None], use_cache=False)
            return token_scores(head, seen[0], targets, chunk=4).log_probs

        def whole() -> torch.Tensor:
            logits = self.model(input_ids=row[None], use_cache=False).logits[before]
            return _log_probs(logits).gather(-1, targets[:, None])[:, 0]

        apart = _difference(chunked(), whole())
        if self.small is not None:  # gradients of a large model take as much memory as the model
            return apart
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        factors = torch.randn(len(targets), generator=torch.Generator().manual_seed(0))
        found = []
        for scores in (chunked, whole):
            with torch.enable_grad():
                parts = torch.autograd.grad((scores() * factors).sum(), weights, allow_unused=True)
            found.append([w.new_zeros(w.shape) if p is None else p for w, p in zip(weights, parts, strict=True)])
        norm = max(float(part.norm()) for part in found[1])
        return max(apart, *(_difference(a, b) / norm for a, b in zip(*found, strict=True)))

    def _batches(self, way: Together) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Rows that go together, with their log-probs alone."""
        if way == "equal":
            longest = max(self.rows, key=len)
            rows = [longest, longest.flip(0)]
        else:
            rows = self.rows
        alone = self.alone(rows)
        if way == "alone":
            yield from (([row], [scores]) for row, scores in zip(rows, alone, strict=True))
        else:
            yield rows, alone


@contextlib.contextmanager
def _by_itself(model: Any) -> Iterator[None]:
    """Inside, without gradients, a model computes as it would by itself, whatever its caller is in: what is found is kept."""
    kinds = {"cpu", next(model.parameters()).device.type}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def _training(model: Any) -> Iterator[None]:
    """Inside, a model is in ``train()``, or in the mode of its own that has some of it there; the random state is left alone."""
    moved = not _trains(model)
    devices = {weight.device for weight in model.parameters() if weight.device.type != "cpu"}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(devices=[*devices], device_type=kind):
        if moved:
            model.train()
        try:
            yield
        finally:
            if moved:
                model.eval()


def _trains(model: Any) -> bool:
    return any(module.training for module in model.modules())


_SAID = {"padded": "rows of any length together", "equal": "rows of one length together", "alone": "row by row"}
# What was found of each model, by the state in which it was; without the model itself, which a value here would keep.
_found: weakref.WeakKeyDictionary[Any, tuple[Any, Prover]] = weakref.WeakKeyDictionary()


def prover_of(model: Any) -> Prover:
    """What tries a model, and remembers what was found.

    Raises:
        ModelError: what the model says of a token depends on what is behind it.
    """
    state = _state(model)
    kept = _found.get(model)
    if kept is None or kept[0] != state:
        small = _small_of(model)
        begun = _begun(model, small=small)
        # What the copy is right for is its windows' length: that is the model's, too, in its own numbers.
        longest = None if small is None or small.longest is None else least_stretch(model.config)
        kept = state, replace(begun, model=None, longest=longest)
        _found[model] = kept
    return replace(kept[1], model=model, training=_trains(model))


@contextlib.contextmanager
def same_model(model: Any, what: str) -> Iterator[Prover]:
    """Inside, a model gets another wrapping, in which what it computes stays the same: what was found of it holds behind that, too.

    Everything is tried before, and each row alone once more behind it.

    Args:
        model: the model, in ``eval()``.
        what: what is done to it, for the record.

    Yields what tries the model as it was.

    Raises:
        ModelError: it computes something else now.
    """
    prover = prover_of(model)
    prover.scoring(), prover.packing(), prover.sharing(), prover.chunking()
    with contextlib.suppress(ModelError):  # which says so again when it is sampled from
        prover.sampling()
    with _by_itself(model), evaluating(model):
        before = prover.alone(prover.rows)
    yield prover
    with _by_itself(model), evaluating(model):
        after = prover.alone(prover.rows)
    if not prover.proof.holds(what, lambda: max(map(_difference, before, after))):
        raise ModelError(f"{prover.proof.name} computes something else when it is {what}: {prover.tried(what)}.")
    _found[model] = _state(model), replace(prover, model=None, training=False)


def _begun(model: Any, lengths: Sequence[int] = _LENGTHS, small: Prover | None = None) -> Prover:
    """A proof with what every other check rests on: that a pass over a row tells what passes over its beginnings tell."""
    proof = Proof(type(model).__name__, LIMIT)
    with _by_itself(model), evaluating(model):
        prover, rounding = Prover(model, proof, _rows(model, lengths), small), 0.0
        for row, alone in zip(prover.rows, prover.alone(prover.rows), strict=True):
            if len(alone) != len(row):
                raise ModelError(
                    f"{proof.name} gives {len(alone)} distributions for a row of {len(row)} tokens (prompt tuning has some in front): "
                    "expected one for each."
                )
            for length in {len(row) // 4, len(row) // 2, len(row) - _MORE} - {0}:
                begun = _log_probs(model(input_ids=row[None, :length], use_cache=False).logits[0])
                rounding = max(rounding, _difference(begun, alone[:length]))
    precision = torch.finfo(float_type(model)).eps
    if precision > torch.finfo(torch.float32).eps:
        proof.limit = min(max(LIMIT, _LEAST * precision, _ROUNDING * rounding), _MOST)
    if rounding > proof.limit:
        raise ModelError(
            f"{proof.name} is not causal: what it says of a token depends on those behind it ({rounding:.2g} nats). Such a model "
            "cannot be sampled from token by token. Give a decoder, or make it one in its config (is_decoder=True)."
        )
    proof.checks["beginnings of rows"] = Check(rounding)
    return prover


_small: dict[Any, Prover | None] = {}  # by class and config


def _small_of(model: Any) -> Prover | None:
    """What tries a small copy of a model; ``None`` where the class makes none of these numbers.

    Raises:
        ModelError: what the copy says of a token depends on what is behind it.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    key = plain_class(model), config._attn_implementation == "eager", config.to_json_string()
    if key not in _small:
        try:
            with torch.inference_mode(False):
                copy = small_copy(model)
            _small[key] = _small_begun(copy)
        except ModelError:
            raise
        except Exception:  # whatever a class raises on numbers that it was not made for
            _small[key] = None
    return _small[key]


def _small_begun(copy: Any) -> Prover:
    """The proof of a small copy: on long rows, or on rows within its windows if only those have log-probs of their own."""
    try:
        return _begun(copy, _LONG)
    except ModelError:
        if least_stretch(copy.config) is None:
            raise
        return replace(_begun(copy, _WITHIN), longest=STRETCH)


def _state(model: Any) -> Any:
    """What a proof depends on, besides the weights."""
    weight, config = next(model.parameters()), getattr(model, "config", None)
    adapters = getattr(model, "active_adapters", None)
    if callable(adapters):  # transformers' own, which raises where none was ever loaded
        adapters = adapters() if getattr(model, "_hf_peft_config_loaded", False) else None
    return (
        type(model),
        float_type(model),
        getattr(model, "_compiled_call_impl", None) is not None,
        weight.dtype,
        weight.device,
        getattr(config, "_attn_implementation", None),
        tuple(adapters) if isinstance(adapters, (list, tuple)) else None,
    )


def _rows(model: Any, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Rows of ids, the same every time; in one of them are those that end, begin and pad rows, which a policy may sample, too.

    Other ids that a config names stand for images and sounds, and are left out.
    """
    known, config = model.get_input_embeddings().num_embeddings, getattr(model, "config", None)
    named = {} if config is None else config.to_dict()
    plain = [i for i in range(min(known, 4096)) if i not in set(_special(named))]
    draw, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    # Few of them, so that ids come again as in any text: what a layer makes of ids alone is then exactly equal.
    ids = torch.tensor(plain or [0])[torch.randperm(max(len(plain), 1), generator=draw, device="cpu")[:16]]
    rows = [ids[torch.randint(len(ids), (length + _MORE,), generator=draw)] for length in lengths]
    ends = [named.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    ends = [i for value in ends for i in (value if isinstance(value, list) else [value])]
    marks = sorted({i for i in ends if isinstance(i, int) and 0 <= i < known})[:_MORE]
    # In the middle, and among the last, which are sampled.
    rows[0][2 : 2 + len(marks)] = rows[0][-1 - len(marks) : -1] = torch.tensor(marks, dtype=torch.int64)
    return [row.to(device) for row in rows]


def _special(config: dict[Any, Any]) -> Iterator[int]:
    """Ids that a config names."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def _log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; infinite where one is no number, or the shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    apart = (one - other).abs().masked_fill(one == other, 0.0)  # two infinities are the same
    worst = float(apart.max())
    return worst if worst == worst else float("inf")
