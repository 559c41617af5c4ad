"""What a turn costs when the chat template drops the reasoning of the answer before it (``history_policy="template"``).

One conversation answers with reasoning of some thousand tokens, and a user message follows, before which the template strips
the reasoning: the environment finds where in the sampled ids it ends, and begins a branch. Linear is what it should be: twice
the tokens, twice the time.

    python benchmarks/rewriting.py [--quick] [--json]
    python benchmarks/rewriting.py --build FOLDER        # beside another checkout of this project, interleaved
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

LENGTHS = (1000, 2000, 4000, 8000)


def seconds(length: int) -> float:
    """Seconds of ``append_messages`` behind an answer of so many tokens; the first of a length warms up."""
    import torch
    from env_throughput import load_tokenizer
    from tensordict import TensorDict
    from torchrl.modules.llm.policies import Tokens

    from torchrl_chat import columns
    from torchrl_chat.envs import ChatEnv

    tokenizer, _ = load_tokenizer(None)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% set text = m['content'] %}"
        "{% if m['role'] == 'assistant' and not loop.last and '</think>' in text %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    env = ChatEnv(input_mode="tokens", tokenizer=tokenizer, batch_size=(1,), history_policy="template")
    spent = []
    for count in (8, length, length):
        td = env.reset(TensorDict(query=["How much?"], batch_size=(1,)))
        said = "<think>\n" + " so" * count + "\n</think>\n\nIt is 4."
        ids = torch.tensor([*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        td.set("tokens", columns.ragged(Tokens, "response", [ids], td.batch_size, None))
        td = env.step_mdp(env.step(td))
        start = time.perf_counter()
        td = env.append_messages(td, ["Are you sure?"])
        spent.append(time.perf_counter() - start)
        [ledger] = columns.read_objects(td.get("transcript"), td.batch_size)
        assert len(ledger.branches) == 1
    return min(spent[1:])


def measured(folder: Path, length: int) -> float:
    """The same with the build of a checkout, in a process of its own."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--length", str(length)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder.resolve())}
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", metavar="FOLDER", help="another checkout, to be measured in the same run")
    parser.add_argument("--quick", action="store_true", help="once each, the two greatest lengths")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.length:
        print(seconds(args.length))
        return
    builds = {"this build": Path(__file__).parents[1]} | ({"that build": Path(args.build)} if args.build else {})
    lengths = LENGTHS[-2:] if args.quick else LENGTHS
    spent: dict[str, dict[int, list[float]]] = {name: {length: [] for length in lengths} for name in builds}
    for _ in range(1 if args.quick else 3):
        for length in lengths:
            for name, folder in builds.items():
                spent[name][length].append(measured(folder, length))
    result: dict = {
        name: {length: statistics.median(runs) for length, runs in rows.items()} for name, rows in spent.items()
    }
    for rows in list(result.values()):
        rows["8000 over 4000"] = rows[8000] / rows[4000]
    if args.build:
        result["8000: this over that"] = result["this build"][8000] / result["that build"][8000]
    print(json.dumps(result, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
