"""Episodes that failed move nobody: not their group, not another step's, not a loss; and a verifier that only fails ends the run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage

from torchrl_chat import (
    DatasetChatEnv,
    Grader,
    RewardTransform,
    TransformersPolicy,
    WeightedSum,
    columns,
    training_view,
)
from torchrl_chat.playing import play
from torchrl_chat.tiny import tiny_model, tiny_tokenizer
from torchrl_chat.training import ExactGRPOLoss, ExactMCAdvantage, group_advantages, policy_loss
from torchrl_chat.transforms import StopReason
from torchrl_chat.transforms.reward import VerifierError

TOKENIZER = tiny_tokenizer()
ROWS = [{"query": f"last({a},{a + 1})=", "answer": str(a + 1)} for a in range(4)]


class Scripted:
    """A verifier with a score for each call in turn; ``None`` fails."""

    def __init__(self, scores):
        self.scores = list(scores)
        self.calls = 0

    def __call__(self, response: str, reference: str) -> float:
        score = self.scores[self.calls % len(self.scores)]
        self.calls += 1
        if score is None:
            raise ConnectionError(f"the grading server is down (call {self.calls})")
        return score


@pytest.fixture(scope="module")
def policy():
    return TransformersPolicy(tiny_model(len(TOKENIZER), hidden=16, layers=1), TOKENIZER, max_new_tokens=3)


def make_env(scores, mode: str = "tokens", prompts: int = 1, group: int = 4, rows=ROWS, **options):
    env = DatasetChatEnv(
        dataset=rows,
        tokenizer=TOKENIZER,
        input_mode=mode,
        num_envs=prompts,
        repeats=group,
        group_repeats=True,
        seed=0,
    )
    options = {"on_failure": "mask", "when": "turn"} | options
    verifier = scores if callable(scores) else Scripted(scores)
    return env.append_transform(RewardTransform(verifier, end_on_answer=True, **options))


def expected(scores, normalize=None) -> list[float]:
    """Advantages of one group by hand, of those that have a score."""
    good = torch.tensor([score for score in scores if score is not None])
    spread = float(good.std()) if normalize and len(good) > 1 else 1.0
    mean = float(good.mean()) if len(good) else 0.0
    return [0.0 if s is None or len(good) < 2 else (s - mean) / max(spread, 1e-6) for s in scores]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestGroupAdvantages:
    @pytest.mark.parametrize("layout", ["ragged", "padded", "packed"])
    @pytest.mark.parametrize("normalize", ["std", None])
    def test_a_row_whose_grade_failed_moves_nobody(self, policy, mode, layout, normalize):
        scores = [1.0, 0.0, None, 1.0, None, None, 2.0, 5.0, None, None, None, None]
        view = training_view(play(make_env(scores, mode, prompts=3), policy), layout=layout)
        right = [a for group in range(3) for a in expected(scores[4 * group : 4 * group + 4], normalize)]
        for found in (
            group_advantages(view, normalize=normalize),
            group_advantages(view["reward"], view["group"], normalize=normalize),  # without being asked
        ):
            assert found.shape == view["reward"].shape
            assert found.flatten().tolist() == pytest.approx(right, abs=1e-5)
        lost = [i for i, score in enumerate(scores) if score is None]
        assert [i for i, group in enumerate(view["group"].tolist()) if group == -1] == lost

    def test_what_is_scored_in_spite_of_a_failure_counts(self, policy):
        scores = [1.0, 0.0, None, 1.0]
        view = training_view(play(make_env(scores, on_failure="score"), policy))
        assert group_advantages(view, normalize=None).flatten().tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])

    @staticmethod
    def broken(key: str):
        """A column that says of the second row of four that it failed."""
        if key == "stop_reason":
            return torch.tensor([1, StopReason.ERROR, StopReason.MAX_TURNS, 1])
        return columns.objects(["", "ConnectionError: gone", "", ""], torch.Size([4]), None)

    @pytest.mark.parametrize("key", ["stop_reason", "env_failure", "policy_error"])
    def test_an_episode_that_broke_is_one_of_them(self, policy, key):
        finished = play(make_env([1.0, 0.0, 4.0, 1.0]), policy)
        if key != "policy_error":  # graded all the same: its failure counts as an answer
            finished[key] = self.broken(key)
            assert training_view(finished)["group"].tolist() == [0, 0, 0, 0]
            finished["graded"] = torch.tensor([True, False, True, True]).reshape(4, 1, 1)
        finished[key] = self.broken(key)
        view = training_view(finished, layout="padded")
        assert view["masks"].all_assistant_mask.any(-1).tolist() == [True, False, True, True]
        assert view["reward"].flatten().tolist() == [1, 0, 4, 1]
        assert group_advantages(view, normalize=None).flatten().tolist() == pytest.approx([-1, 0, 2, -1])

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
    def test_rows_of_nobody_are_as_if_they_were_not_there(self, rows):
        group, reward, valid = (torch.tensor(values) for values in zip(*rows, strict=True))
        found = group_advantages(reward.float(), group, valid=valid)
        kept = (group >= 0) & valid
        assert not found[~kept].any()
        if kept.any():
            assert torch.allclose(found[kept], group_advantages(reward.float()[kept], group[kept]), atol=1e-6)

    def test_what_is_missing_is_named(self, policy):
        view = training_view(play(make_env([1.0]), policy), group=None)
        with pytest.raises(KeyError, match="the view has no 'group'"):
            group_advantages(view)
        with pytest.raises(TypeError, match="needs a training view, or rewards and their groups"):
            group_advantages(view["reward"])

    @pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
    def test_in_no_loss_of_ours_it_makes_the_others_smaller(self, aggregation):
        torch.manual_seed(0)
        new, old, advantage = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3)
        mask = torch.ones(3, 5).bool()
        mask[1] = False
        options = {"aggregation": aggregation, "constant": 5.0 if aggregation == "constant" else None}
        kept = torch.tensor([0, 2])
        whole = policy_loss(new, old, advantage, mask, **options)[0]
        assert torch.allclose(whole, policy_loss(new[kept], old[kept], advantage[kept], mask[kept], **options)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
class TestTorchRL:
    @staticmethod
    def buffered(steps, cls=ExactMCAdvantage, **options):
        buffer = ReplayBuffer(storage=LazyStackStorage(100), transform=cls(grpo_size=4, **options), batch_size=4)
        for batch in steps:
            buffer.extend(batch.reshape(-1))
        return buffer

    @staticmethod
    def told(buffer) -> dict[int, float]:
        """The advantage of each row in the buffer, by its reward."""
        if not len(buffer):
            return {}
        rows = buffer[:]
        rewards, advantages = (rows.get(key, as_list=True) for key in (("next", "reward"), "advantage"))
        return {
            float(reward.flatten()[0]): float(advantage.flatten()[0])
            for reward, advantage in zip(rewards, advantages, strict=True)
        }

    @pytest.mark.parametrize("returns", [None, "sum"])
    @pytest.mark.parametrize(
        "scores", [[1.0, 5.0, None, 2.0], [3.0, None, None, None], [None] * 4, [1.0, 2.0, 4.0, 8.0]]
    )
    def test_a_failed_row_completes_its_group_and_is_not_trained(self, policy, mode, scores, returns):
        env = make_env(scores, mode)
        buffer = self.buffered([env.step(policy(env.reset()))], trajectory_return=returns)
        right = dict(zip(scores, expected(scores, "std"), strict=True))
        right.pop(None, None)
        found = self.told(buffer)
        assert found.keys() == right.keys()
        assert all(found[key] == pytest.approx(right[key], abs=1e-4) for key in found)
        assert buffer._transform[0].queued_trajectories == 0
        if len(buffer):
            assert "_group" not in buffer[:].keys()

    def test_torchrls_own_trains_it(self, policy):
        """The check above can fail."""
        env = make_env([1.0, 5.0, None, 2.0])
        found = self.told(self.buffered([env.step(policy(env.reset()))], MCAdvantage))
        assert found[0.0] == pytest.approx(-0.93, abs=0.01)

    def test_episodes_of_several_turns(self, policy):
        """Each step of a failed one is left out."""
        from torchrl.envs import StepCounter

        from torchrl_chat import UserSimulator

        def verify(response: str, reference: str) -> float:
            calls.append(response)
            if len(calls) == 2:
                raise ConnectionError
            return float(len(calls))

        calls: list[str] = []
        env = DatasetChatEnv(
            dataset=ROWS[:1],
            tokenizer=TOKENIZER,
            input_mode="tokens",
            num_envs=1,
            repeats=4,
            group_repeats=True,
            seed=0,
        )
        env = env.append_transform(UserSimulator(lambda messages: "="))
        env = env.append_transform(StepCounter(max_steps=2))
        env = env.append_transform(RewardTransform(verify, end_on_answer=False, on_failure="mask"))
        steps = env.rollout(2, policy)
        buffer = ReplayBuffer(storage=LazyStackStorage(100), transform=ExactMCAdvantage(grpo_size=4), batch_size=4)
        buffer.extend(steps)
        assert len(buffer) == 6
        assert len({float(r.flatten()[0]) for r in buffer[:].get(("next", "reward"), as_list=True)} - {0.0}) == 3

    def test_what_a_step_left_behind_meets_no_later_step(self, policy):
        """Three of a group now, four of its question's in the next epoch: those four are a group, and the three wait."""
        env = make_env([1.0], rows=ROWS[:1])
        first = env.step(policy(env.reset()))
        second = env.step(policy(env.reset()))
        assert first["episode_row"].tolist() == second["episode_row"].tolist()
        for cls, epochs in ((ExactMCAdvantage, {1}), (MCAdvantage, {0, 1})):
            buffer = self.buffered([first[:3], second], cls)
            assert set(torch.stack(buffer[:].get("episode_epoch", as_list=True)).flatten().tolist()) == epochs
            assert buffer._transform[0].queued_trajectories == 3

    def test_the_rest_of_a_group_may_come_later(self, policy):
        env = make_env([1.0, 2.0, 3.0, 4.0], prompts=2)
        steps = env.step(policy(env.reset()))
        buffer = self.buffered([steps[:3], steps[5:], steps[3:5]])
        assert len(buffer) == 8

    @pytest.mark.parametrize("scores", [[1.0, 0.0, None, None], [1.0, None, 0.0, 0.0]])
    def test_dynamic_sampling_looks_at_graded_candidates(self, policy, scores):
        """Six candidates for a group of four: those that failed are none."""
        env = make_env([*scores, 1.0, 0.0], group=6)
        transform = ExactMCAdvantage(
            4,
            trajectory_return="sum",
            keep_return_bounds=(0.1, 0.9),
            candidate_group_size=6,
            candidate_selection_min_size=6,
        )
        buffer = ReplayBuffer(storage=LazyStackStorage(100), transform=transform, batch_size=4)
        buffer.extend(env.step(policy(env.reset())))
        assert len(buffer) == 4
        assert all(bool(graded.all()) for graded in buffer[:].get(("next", "graded"), as_list=True))

    def test_groups_that_nothing_tells_are_refused(self, policy):
        env = make_env([1.0])
        steps = env.step(policy(env.reset()))
        with pytest.raises(KeyError, match="'episode_epoch' and 'episode_row'.*Pass prompt_key="):
            self.buffered([steps.exclude("episode_row")])
        assert len(self.buffered([steps.exclude("episode_row")], prompt_key="query")) == 4

    def test_a_whole_batch_in_torchrls_loop(self, policy):
        """Collector, buffer and loss: what failed has no part in any gradient."""
        scores = [1.0, 0.0, None, 3.0]
        env = make_env(scores, prompts=2)
        collector = LLMCollector(env, policy=policy, dialog_turns_per_batch=8, total_dialog_turns=8)
        [batch] = list(collector)
        collector.shutdown()
        buffer = self.buffered([batch])
        assert len(buffer) == 6
        loss = GRPOLoss(policy, masking_strategy="sft")(buffer[:])
        assert float(loss.ESS) == pytest.approx(1.0, abs=1e-3)

    def test_rows_without_a_trained_token_do_not_dilute_a_mean_over_prompts(self, policy):
        view, rows = training_view(play(make_env([1.0, None, 0.0, 3.0]), policy)), []
        lengths = [len(row) for row in view["tokens"].get("full", as_list=True)]
        for row, (part, length) in enumerate(zip(view.unbind(0), lengths, strict=True)):
            part["advantage"] = torch.full((length, 1), 1.0 + row)
            rows.append(part)
        view = lazy_stack(rows)

        def gradient(cls, rows):
            part = view[torch.tensor(rows)]
            policy.model.zero_grad()
            cls(policy, masking_strategy="rlhf", aggregation="prompt_mean")(part).loss_objective.sum().backward()
            return torch.cat([p.grad.flatten() for p in policy.model.parameters()])

        with_it, without = (gradient(ExactGRPOLoss, rows) for rows in ([0, 1, 2, 3], [0, 2, 3]))
        assert torch.allclose(with_it, without, atol=1e-6)
        assert float(with_it.norm()) > 1e-4
        assert torch.allclose(
            gradient(GRPOLoss, [0, 1, 2, 3]) * 4 / 3, without, atol=1e-5
        )  # the defect that is mended


def down(response: str, reference: str) -> float:
    raise ConnectionError("nobody listens on port 9")


class TestBrokenVerifiers:
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("isolate", [False, True], ids=["here", "worker"])
    @pytest.mark.parametrize("composed", [False, True], ids=["alone", "composed"])
    def test_one_that_only_fails_ends_the_run_with_its_first_traceback(self, policy, isolate, composed):
        verifier = WeightedSum({"right": down, "long": lambda response, reference: 1.0}) if composed else down
        env = make_env(verifier, prompts=1, on_failure="score", isolate=isolate and not composed, workers=1)
        for _ in range(2):
            play(env, policy)
        with pytest.raises(VerifierError, match="no grade came for 3 batches running") as error:
            play(env, policy)
        text = str(error.value)
        assert "ConnectionError: nobody listens on port 9" in text
        assert 'raise ConnectionError("nobody listens on port 9")' in text  # the line of the verifier
        assert "in down" in text
        env.close()

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_one_answer_that_is_graded_begins_the_count_anew(self, policy):
        scores = [None] * 8 + [None, 1.0, None, None] + [None] * 8
        env = make_env(scores)
        for _ in range(5):
            play(env, policy)
        with pytest.raises(VerifierError, match="down \\(call 13\\)"):  # the first of these three
            play(env, policy)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_few_rows_a_batch_take_more_batches(self, policy):
        env = make_env([None], group=1)
        for _ in range(7):
            play(env, policy)
        with pytest.raises(VerifierError, match="8 batches running"):
            play(env, policy)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_it_can_be_switched_off(self, policy):
        env = make_env([None], patience=None)
        for _ in range(6):
            play(env, policy)
        with pytest.raises(ValueError, match="patience=0"):
            RewardTransform(down, patience=0)

    def test_reasons_are_plain_text_in_columns(self, policy):
        env = make_env([None])
        with pytest.warns(RuntimeWarning, match="4 of 4 grades failed"):
            finished = play(env, policy)
        assert {type(why) for why in columns.read_objects(finished["grade_failure"], torch.Size([4]))} == {str}

    def test_a_grader_alone_counts_nothing(self):
        """Offline grading tells how many failed; there is no run to stop."""
        from torchrl_chat.rewards import Episode

        grader = Grader(down)
        for _ in range(5):
            with pytest.warns(RuntimeWarning):
                verdicts = grader.grade([Episode.of("1", "1")] * 4)
        assert all("nobody listens" in verdict.failure for verdict in verdicts)


def test_the_view_takes_what_failed_from_any_batch_shape(policy):
    """A failed row is found wherever it stands in a batch of several dimensions."""
    finished = play(make_env([1.0, 2.0, 3.0, 4.0]), policy)
    rows = TensorDict(
        {key: finished[key] for key in ("transcript", "reward", "query")}
        | {"stop_reason": torch.tensor([1, 1, StopReason.ERROR, 1])},
        batch_size=[4],
    ).reshape(2, 2)
    assert training_view(rows)["group"].tolist() == [0, 0, -1, 0]
