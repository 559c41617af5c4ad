"""The drift episode (``benchmarks/drift.py``), our half: whatever a template would write for what was sampled, one sequence."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest
from agents import check_law
from conftest import corpus_tokenizer, need_shared, of_the_day

from torchrl_chat.gateway.templates import Templates

PATH = Path(__file__).parents[1] / "benchmarks" / "drift.py"
SPEC = importlib.util.spec_from_file_location("drift", PATH)
drift = importlib.util.module_from_spec(SPEC)
sys.modules["drift"] = drift
SPEC.loader.exec_module(drift)
# What these templates have no words for is tested to be left out for that reason alone.
CALLS = ("lc_Qwen", "lc_meta-llama", "lc_mistralai", "lc_deepseek")


@pytest.mark.corpus
@pytest.mark.parametrize("name", of_the_day(*drift.TEMPLATES))
def test_an_episode_that_drifts_is_one_sequence_and_two_with_compaction(name):
    need_shared("corpus/corpus.py")
    tokenizer = corpus_tokenizer(name)
    templates, found = Templates(tokenizer), {}
    for kind in drift.EPISODES:
        episode = asyncio.run(drift.play(name, tokenizer, templates, kind))
        if episode is None:
            continue
        found[kind] = check_law(episode.session, log_prob=-0.5)
        assert len(episode.requests) == drift.TURNS
        assert episode.session.report["forks"] == 0
        if kind == "10 %":  # or nothing would have drifted
            texts = [templates.plain.codec.decode([ids])[0] for _, _, ids in episode.requests]
            again = templates.plain.codec.encode(texts)
            assert sum(list(a) != b for a, (_, _, b) in zip(again, episode.requests, strict=True)) >= 4
    assert found.pop("compaction") == 2
    assert set(found.values()) == {1}
    assert {"0 %", "2 %", "10 %"} <= set(found)
    assert ("calls" in found) == name.startswith(CALLS)
    assert ("thinking" in found) == bool(templates.plain.parser and templates.plain.parser.pairs)
