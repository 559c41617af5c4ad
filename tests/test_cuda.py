"""On a GPU: the environment's tensors are there, and its ledgers, log-probs and losses are those of the CPU."""

from __future__ import annotations

import episodes
import pytest
import torch
from chat_rows import ledgers, make, queries, respond
from torchrl.collectors.llm import LLMCollector
from torchrl.data import LazyStackStorage, ReplayBuffer
from torchrl.envs import StepCounter
from torchrl.envs.utils import check_env_specs
from torchrl.objectives.llm.grpo import GRPOLoss, MCAdvantage

from torchrl_chat import DatasetChatEnv, RewardTransform, TransformersPolicy, columns, training_view
from torchrl_chat.models.sampling import GumbelNoise
from torchrl_chat.policies import ExactTransformersWrapper
from torchrl_chat.rewards import NumberVerifier
from torchrl_chat.tiny import last_digit_rows, tiny_model, tiny_tokenizer
from torchrl_chat.training import gae, group_advantages, policy_loss, sequence_log_probs, token_rewards
from torchrl_chat.transforms.kl import RetrieveKL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TEMPERATURE = 0.8


def policy(device: torch.device, **options) -> TransformersPolicy:
    options = {"max_new_tokens": 24, "temperature": TEMPERATURE, "seeded": True, **options}
    return TransformersPolicy(episodes.model(extra=3).to(device), episodes.tokenizer(), **options)


def tensors(td) -> list[torch.Tensor]:
    """All that is a tensor, in whatever container of whatever row."""
    rows = [row.to_tensordict() for row in td.reshape(-1).unbind(0)]
    return [leaf for row in rows for leaf in row.values(True, True) if isinstance(leaf, torch.Tensor)]


def sequences(td) -> list[tuple]:
    return [
        (t.tokens.tolist(), t.mask.tolist(), t.messages) for t in columns.read_objects(td["transcript"], td.shape)
    ]


class TestEnvironment:
    def test_specs(self, mode):
        env = make(mode, device=CUDA)
        td = env.reset(queries(env).to(CUDA))
        assert td.device == td["tokens"].device == CUDA
        check_env_specs(env, tensordict=td)

    def test_every_tensor_is_there(self, mode):
        env = make(mode, device=CUDA)
        td = env.reset(queries(env).to(CUDA))
        for _ in range(2):
            assert {leaf.device for leaf in tensors(td)} == {CUDA}
            stepped = env.step(respond(env, td))
            assert {leaf.device for leaf in tensors(stepped)} == {CUDA}
            td = env.append_messages(env.step_mdp(stepped), ["and?"] * 3)

    @pytest.mark.parametrize("moved", [False, True])
    def test_the_ledgers_are_those_of_the_cpu(self, mode, moved):
        found = []
        for device in (CPU, CUDA):
            env = make(mode).to(device) if moved else make(mode, device=device)
            td = env.reset(queries(env).to(device))
            for turn in range(3):
                td = env.step_mdp(env.step(respond(env, td, ended=turn != 1)))
                td = env.append_messages(td, ["and?", None, "go on"])
            found.append([(t.tokens.tolist(), t.mask.tolist(), t.log_probs.tolist()) for t in ledgers(td)])
        assert found[0] == found[1]

    def test_a_policy_on_another_device(self, mode):
        """The model on the GPU and the environment on the CPU, and the other way round."""
        found = []
        for env_device, device in ((CPU, CPU), (CPU, CUDA), (CUDA, CPU), (None, CUDA)):
            td, _ = episodes.play(episodes.environment(mode, 8, env_device), policy(device))
            assert td.device == env_device
            found.append(sequences(td))
        assert all(other == found[0] for other in found)


class TestPolicies:
    def test_acceptance(self, mode):
        """64 ragged episodes with tools: log-probs, effective sample size, and both again after an optimizer step."""
        act = policy(CUDA)
        for _ in range(2):
            td, count = episodes.play(episodes.environment(mode, device=CUDA), act)
            assert episodes.check(td, count, act.model, TEMPERATURE) < 1e-4
            loss = episodes.losses(td, act)
            assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
            assert abs(loss.kl_approx.item()) < 1e-5
            episodes.one_step(td, act)
        assert episodes.check(td, count, act.model, TEMPERATURE) > 1e-2, "log-probs of before the update are others"

    def test_acceptance_of_the_wrapper(self, mode):
        torch.manual_seed(0)
        act = ExactTransformersWrapper(
            episodes.model(extra=3).to(CUDA),
            tokenizer=episodes.tokenizer(),
            input_mode=mode,
            generate_kwargs={"max_new_tokens": 24, "do_sample": True, "temperature": TEMPERATURE},
        )
        actor = act.get_new_version(generate=False)
        for _ in range(2):
            td, count = episodes.play(episodes.environment(mode, device=CUDA), act)
            assert episodes.check(td, count, act.model, TEMPERATURE) < 1e-4
            loss = episodes.losses(td, actor)
            assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
            episodes.one_step(td, actor)

    def test_noise_is_that_of_the_cpu(self):
        seeds, lengths = [3, -9, 2**62], torch.tensor([1, 700, 70_000])
        there = GumbelNoise(seeds, lengths.to(CUDA), 4, CUDA).at(3, 5000)
        assert there.device == CUDA
        assert torch.allclose(there.cpu(), GumbelNoise(seeds, lengths, 4, CPU).at(3, 5000), atol=1e-5)

    def test_a_large_vocabulary(self):
        """A vocabulary and a width of Qwen2.5-0.5B's: log-probs of 64 sampled answers against one forward pass."""
        model = tiny_model(151_936, hidden=896, layers=4, context=1024).to(CUDA)
        act = TransformersPolicy(model, episodes.tokenizer(), max_new_tokens=64, seeded=True, stop_ids=[2])
        act.vocab_size = 151_936
        draw = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, 151_936, (20 + 5 * i,), generator=draw).to(CUDA) for i in range(64)]
        ids, scores = act.generate(prompts, seeds=list(range(64)))
        for prompt, row, score in zip(prompts, ids, scores, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.cat((prompt, row))[None]).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(score, logits.log_softmax(-1).gather(-1, row[:, None])[:, 0], atol=1e-4)


class TestTraining:
    @pytest.fixture(scope="class")
    def finished(self):
        """The same episodes, on the CPU and on the GPU."""
        there, _ = episodes.play(episodes.environment("tokens", 16, CUDA), policy(CUDA), turns=3)
        assert there.device == CUDA
        return there.cpu(), there

    @pytest.mark.parametrize(
        "options", [{"layout": "padded"}, {"layout": "padded", "side": "left"}, {"layout": "packed"}]
    )
    def test_from_episodes_to_gradients(self, finished, options):
        """Views, log-probs, advantages, losses and gradients, each on its device."""
        found = []
        for td, device in zip(finished, (CPU, CUDA), strict=True):
            td["reward"] = torch.linspace(-1, 1, 16).reshape(16, 1, 1)
            view = training_view(td, group=4, **options)
            assert {leaf.device for leaf in tensors(view)} == {device}
            act = policy(device)
            scores = sequence_log_probs(
                act.model, view, temperature=TEMPERATURE, vocab_size=act.vocab_size, entropy=True
            )
            flat = training_view(td, group=4, layout="padded")
            advantage = group_advantages(flat["reward"], flat["group"], episode=flat["episode"])
            rewards = token_rewards(flat["reward"], flat["masks"].all_assistant_mask)
            values = flat["log_probs"].full
            ahead, _ = gae(rewards, values, flat["masks"].all_assistant_mask, gamma=0.99)
            loss, metrics = policy_loss(scores.log_probs, view["log_probs"].full, scores.mask.float(), scores.mask)
            assert float(metrics["ess"]) == pytest.approx(1.0, abs=1e-4)
            (loss + scores.entropy.sum()).backward()
            gradients = torch.cat([p.grad.flatten() for p in act.model.parameters()])
            found.append([x.detach().cpu() for x in (scores.log_probs, advantage, ahead, loss, gradients)])
        for here, there in zip(*found, strict=True):
            assert torch.allclose(here, there, atol=1e-4, rtol=1e-4)

    def test_kl(self):
        found = []
        for device in (CPU, CUDA):
            env = episodes.environment("tokens", 8, device)
            env = env.append_transform(
                RetrieveKL(tiny_model(len(episodes.tokenizer()), seed=9).to(device), coeff=0.3)
            )
            td = env.step(policy(device)(episodes.first(env)))["next"]
            assert {leaf.device for leaf in tensors(td)} == {device}
            found.append(td["reward"].cpu())
        assert found[0].abs().min() > 0.01
        assert torch.allclose(*found, atol=1e-4)

    def test_a_collector_and_a_replay_buffer(self):
        """torchrl's own loop on the device: questions, answers, rewards, advantages, the loss and its gradient."""
        tokenizer = tiny_tokenizer()
        env = DatasetChatEnv(
            dataset=last_digit_rows(64), tokenizer=tokenizer, input_mode="tokens",
            num_envs=16, repeats=4, batch_size_dl=4, seed=0, device=CUDA,
        )  # fmt: skip
        env = env.append_transform(StepCounter(max_steps=1))
        env = env.append_transform(RewardTransform(NumberVerifier()))
        act = TransformersPolicy(tiny_model(len(tokenizer)).to(CUDA), tokenizer, max_new_tokens=4)
        batch = next(iter(LLMCollector(env, policy=act, dialog_turns_per_batch=16, total_dialog_turns=-1)))
        assert batch.device == CUDA
        assert batch["next", "graded"].all()
        buffer = ReplayBuffer(storage=LazyStackStorage(16), batch_size=16, transform=MCAdvantage(grpo_size=4))
        buffer.extend(batch.reshape(-1))
        loss = GRPOLoss(act)(buffer.sample())
        assert loss.ESS.item() == pytest.approx(1.0, abs=1e-4)
        loss.loss_objective.backward()
        assert all(torch.isfinite(p.grad).all() for p in act.model.parameters())

    def test_the_state_of_conversations_in_flight(self):
        """Saved on the GPU, loaded on the CPU and back: the conversations go on alike."""
        td, _ = episodes.play(episodes.environment("tokens", 8, CUDA), policy(CUDA), turns=1)
        moved = td.cpu()
        assert sequences(moved) == sequences(td) == sequences(moved.to(CUDA))
        env = episodes.environment("tokens", 8, CUDA)
        messages = ["and?" if t.ended is not None else None for t in ledgers(td)]
        asked = [env.base_env.append_messages(x, messages) for x in (td, moved.to(CUDA))]
        answers = [sequences(env.step(policy(CUDA)(x))["next"]) for x in asked]
        assert answers[0] == answers[1]
