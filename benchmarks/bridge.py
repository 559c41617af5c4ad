"""What one turn costs: reading what the policy sampled, and extending the prompt by what comes next.

    pip install renderers && python benchmarks/bridge.py [--quick] [--json] [--families Qwen3 Llama-3.1]

A conversation is at turn t. The policy has sampled about 150 tokens (reasoning and an answer, or reasoning and a
tool call, in the words of its family); a user message or a tool's result follows. Four ways to the next prompt:

- ours: ``ChatTemplate.parse_batch`` of the sampled ids, the close of the turn and ``follow_batch``, appended to the
  ledger (an array of int64, which a list of ids is not: the garbage collector walks over lists): what ``ChatEnv``
  does each turn. Only new text is rendered and tokenized.
- ours, lists: ``parse_batch``, then the public ``extend_batch``, which returns whole new lists of ids (so it copies
  the prompt; the only part that grows).
- renderers (the package of that name on PyPI, 0.1.12 measured): ``parse_response``, then
  ``bridge_to_next_turn``, row by row as it has no batched call. An optional peer: without it the column is empty. It
  gets the prompt for parsing, as its own client does, and ``thinking_retention="all"``: by default it refuses
  to extend over a user message where the family has reasoning.
- transformers: ``apply_chat_template(..., tokenize=True)`` of the whole conversation, on at most 4 rows (its cost a
  row is the same in a larger batch). It is asked for no parsing, and its ids are not those that were sampled.

Measured are the first turns (1-4) and late ones (61-64), a batch of one row and of 64 rows. Figures are
microseconds a row: the median of the repeats, then the mean of the window's four turns.

How it is kept fair: all systems get the same conversations, the same prompt ids and the same sampled ids, made before
the clock starts (``time.perf_counter``), and copies of them where they are changed in place (with room to grow,
as in a ledger's buffer). Where the generation prompt of ``renderers`` has more than the template's (gpt-oss), the
same ids are parted between prompt and sample as it expects them. One thread for
all (``TOKENIZERS_PARALLELISM=false``; ``--parallel`` lets the tokenizer use every core, which batches of ours and of
transformers profit from). Every system is run once on every input before timing; repeats go round the systems,
so that a noisy moment hits all of them. The garbage collector stays on; it is run between systems, and what
stands before timing is frozen. Before timing, the extended ids and parsed messages of ours and of ``renderers``
are compared; where they differ, the table says so, and the run goes on.

Real tokenizers and templates come from the shared corpus (``TORCHRL_CHAT_SHARED``, default ``../shared``); without
it, a small byte-level BPE with ChatML is trained on the spot, and transformers is the only peer.
"""

from __future__ import annotations

import argparse
import base64
import copy
import gc
import importlib.metadata
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torchrl_chat.templates import BridgeError, ChatTemplate
from torchrl_chat.templates.kinds import Course

TEXT = (
    "the answer of this question is found by adding all numbers that we know so far and then we divide them because "
    "every person gets a fair share of what was bought in town on monday before noon twelve apples cost 3.50 dollars "
    "each, so 12 * 3.50 = 42 and therefore Natalia sold 48 clips to her friends in April"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks up a fact.",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "What to look up."}},
                "required": ["query"],
            },
        },
    }
]
FIRST, LATE = (1, 2, 3, 4), (61, 62, 63, 64)
BATCHES = (1, 64)
CONVERSATIONS = 8  # distinct histories; the rows of a batch share them, each with its own turn
SYSTEMS = ("ours", "ours, lists", "renderers", "transformers")


class Family(NamedTuple):
    """How the models of a family write, in this template of the corpus and this renderer of ``renderers``."""

    template: str
    renderer: str | None
    answer: str
    call: str | None = None
    opening: str = (
        ""  # what the generation prompt of ``renderers`` has already, and the template leaves to the policy
    )


THINK = "<think>\n{thoughts}\n</think>\n\n"
FAMILIES = {
    "Qwen3": Family(
        "lc_Qwen-Qwen3-0.6B",
        "qwen3",
        THINK + "{answer}<|im_end|>",
        THINK + '<tool_call>\n{{"name": "lookup", "arguments": {arguments}}}\n</tool_call><|im_end|>',
    ),
    "Llama-3.1": Family(
        "lc_meta-llama-Llama-3.1-8B-Instruct",
        "llama-3",
        "{answer}<|eot_id|>",
        '{{"name": "lookup", "parameters": {arguments}}}<|eot_id|>',
    ),
    "gpt-oss": Family(
        "lc_openai-gpt-oss-120b",
        "gpt-oss",
        "<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant<|channel|>final<|message|>{answer}<|return|>",
        "<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant to=functions.lookup<|channel|>commentary "
        "json<|message|>{arguments}<|call|>",
        opening="<|channel|>analysis<|message|>",
    ),
    "GLM-4.6": Family(
        "lc_GLM-4.6",
        "glm-4.5",
        "\n<think>{thoughts}</think>\n{answer}<|user|>",
        "\n<think>{thoughts}</think>\n<tool_call>lookup\n<arg_key>query</arg_key>\n<arg_value>{answer}</arg_value>\n"
        "</tool_call><|observation|>",
    ),
    "GLM-4.7": Family(
        "lc_GLM-4.7-Flash",
        "glm-5",
        "{thoughts}</think>{answer}<|user|>",
        "{thoughts}</think><tool_call>lookup<arg_key>query</arg_key><arg_value>{answer}</arg_value></tool_call>"
        "<|observation|>",
    ),
    "MiniMax-M2": Family(
        "lc_MiniMax-M2",
        "minimax-m2",
        "{thoughts}\n</think>\n\n{answer}[e~[",
        '{thoughts}\n</think>\n\n<minimax:tool_call>\n<invoke name="lookup">\n<parameter name="query">{answer}'
        "</parameter>\n</invoke>\n</minimax:tool_call>[e~[",
    ),
    "Qwen2.5": Family(
        "lc_Qwen-Qwen2.5-7B-Instruct",
        None,
        "{answer}<|im_end|>",
        '<tool_call>\n{{"name": "lookup", "arguments": {arguments}}}\n</tool_call><|im_end|>',
    ),
}
QUICK = ("Qwen3", "Llama-3.1", "gpt-oss", "GLM-4.6", "Qwen2.5")


# ---------------------------------------------------------------------- conversations
@dataclass
class Row:
    """A conversation that waits for the policy, what the policy samples, and what follows."""

    messages: list[dict[str, Any]]
    course: Course
    ids: list[int]
    sampled: list[int] = field(default_factory=list)
    new: list[dict[str, Any]] = field(default_factory=list)
    peer_ids: list[int] = field(default_factory=list)  # the same ids, parted where renderers' prompt ends
    peer_sampled: list[int] = field(default_factory=list)

    def copy(self) -> Row:
        """A row that can be changed in place, its ids in a list with room for more, as a ledger's buffer has."""
        new = copy.copy(self)
        new.messages, new.ids = list(self.messages), list(self.ids)
        new.ids += self.ids[: len(self.ids) // 4]
        del new.ids[len(self.ids) :]
        return new

    def on_tape(self) -> Row:
        """The row with its ids in an array of int64, as a ledger keeps them: no Python object an id."""
        self.ids = array("q", self.ids)
        return self


class Case:
    """One family and one kind of turn: its template, and its conversations at the measured turns."""

    def __init__(self, name: str, family: Family, tokenizer: Any, with_tools: bool, rows: int, seed: int = 0):
        self.name, self.family, self.tokenizer = name, family, tokenizer
        self.kind = "tool" if with_tools else "user"
        self.tools = TOOLS if with_tools else None
        self.template = ChatTemplate(tokenizer, tools=self.tools)
        draw = random.Random(seed)
        written = family.call if with_tools else family.answer
        assert written is not None
        self.sampled = [self._sample(written, draw) for _ in range(rows)]
        self.texts = [" ".join(draw.choices(TEXT.split(), k=24)) for _ in range(rows)]
        self.turns = self._play(rows)
        self.renderer, self.why_not = renderer_of(family, tokenizer)

    def _sample(self, written: str, draw: random.Random) -> list[int]:
        """Ids of a turn of about 150 tokens."""
        words = draw.choices(TEXT.split(), k=draw.randint(100, 135))
        half = len(words) // 2 if "{thoughts}" in written else 0
        answer = " ".join(words[half:])
        arguments = json.dumps({"query": answer})
        text = written.format(thoughts=" ".join(words[:half]), answer=answer, arguments=arguments)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _play(self, rows: int) -> dict[int, list[Row]]:
        """The conversations, played with ours, at every measured turn."""
        system = {"role": "system", "content": "You are a helpful assistant."}
        asked = [[system, {"role": "user", "content": text}] for text in self.texts[:CONVERSATIONS]]
        played = [Row(m, Course.of(m), self.template.render(m)) for m in asked]
        opening = self.tokenizer(self.family.opening, add_special_tokens=False)["input_ids"]
        turns = {}
        for turn in range(1, LATE[-1] + 1):
            if turn in (*FIRST, *LATE):
                turns[turn] = [self._at(played[i % len(played)], turn, i, opening) for i in range(rows)]
            played = [self._at(row, turn, i, opening) for i, row in enumerate(played)]
            run_ours(self, played)
        return turns

    def _at(self, row: Row, turn: int, i: int, opening: list[int]) -> Row:
        row = row.copy()
        place = (i + turn) % len(self.sampled)
        row.sampled = self.sampled[place]
        if self.tools:
            result = {"role": "tool", "name": "lookup", "content": json.dumps({"found": self.texts[place]})}
            row.new = [result | {"tool_call_id": f"call{len(row.course.call_ids):05d}"}]
        else:
            row.new = [{"role": "user", "content": self.texts[place]}]
        cut = len(opening) if row.sampled[: len(opening)] == opening else 0
        row.peer_ids, row.peer_sampled = row.ids + opening[:cut], row.sampled[cut:]
        return row


# ---------------------------------------------------------------------- the systems
def read(case: Case, rows: Sequence[Row]) -> list[Any]:
    """What ours reads in a turn: the parsed responses, whose messages join the conversations."""
    courses = [row.course for row in rows]
    parsed = case.template.parse_batch([row.sampled for row in rows], courses, prompts=[row.ids for row in rows])
    for row, answer in zip(rows, parsed, strict=True):
        row.messages.append(answer.message)
        row.course = row.course.then([answer.message])
    return parsed


def run_ours(case: Case, rows: Sequence[Row]) -> None:
    """As ChatEnv: rows become the next prompts."""
    results = read(case, rows)
    for row, parsed in zip(rows, results, strict=True):
        row.ids.extend(row.sampled)
        row.ids.extend(parsed.close.suffix(parsed.stop).ids)
    follows = case.template.follow_batch(
        [row.messages for row in rows],
        [row.new for row in rows],
        courses=[row.course for row in rows],
        stops=[parsed.stop for parsed in results],
    )
    for row, follow in zip(rows, follows, strict=True):
        row.ids.extend(follow.ids)
        row.messages += row.new
        row.course = row.course.then(row.new)


def run_ours_lists(case: Case, rows: Sequence[Row]) -> list[list[int]]:
    """The public call."""
    results = read(case, rows)
    return case.template.extend_batch(
        [row.ids + row.sampled for row in rows],
        [row.messages for row in rows],
        [row.new for row in rows],
        ended=[parsed.ended for parsed in results],
    )


def run_renderers(case: Case, rows: Sequence[Row]) -> list[Any]:
    """The parsed response and the next prompt of each row."""
    renderer, tools = case.renderer, case.tools
    return [
        (
            renderer.parse_response(row.peer_sampled, tools=tools, prompt_ids=row.peer_ids),
            renderer.bridge_to_next_turn(row.peer_ids, row.peer_sampled, row.new, tools=tools),
        )
        for row in rows
    ]


def run_transformers(case: Case, rows: Sequence[Row]) -> Any:
    """All of it again."""
    return case.tokenizer.apply_chat_template(
        [row.messages for row in rows],
        tools=case.tools,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


def renderer_of(family: Family, tokenizer: Any) -> tuple[Any, str]:
    """The peer's renderer of a family, or why there is none."""
    if family.renderer is None:
        return None, "the package has no renderer of this family"
    try:
        from renderers import config_from_name, create_renderer
    except ImportError as error:
        return None, f"not installed: pip install renderers ({error})"
    config = type(config_from_name(family.renderer))(thinking_retention="all")
    try:
        if family.renderer != "gpt-oss" or "TIKTOKEN_ENCODINGS_BASE" in os.environ:
            return create_renderer(tokenizer, config), ""
        with tempfile.TemporaryDirectory() as folder:  # openai-harmony would download the vocabulary that is here
            write_vocabulary(tokenizer, Path(folder) / "o200k_base.tiktoken")
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
            try:
                return create_renderer(tokenizer, config), ""
            finally:
                del os.environ["TIKTOKEN_ENCODINGS_BASE"]
    except Exception as error:  # whatever it lacks, the other systems are measured
        return None, f"{type(error).__name__}: {error}"


def write_vocabulary(tokenizer: Any, path: Path) -> None:
    """A byte-level vocabulary as tiktoken stores it."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte = {character: value for value, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    words = sorted((i, word) for word, i in tokenizer.get_vocab().items() if i not in added)
    lines = [base64.b64encode(bytes(byte[c] for c in word)) + b" %d\n" % i for i, word in words]
    path.write_bytes(b"".join(lines))


# ---------------------------------------------------------------------- agreement
def compare(case: Case) -> list[str]:
    """Where ours and renderers differ in the same extension, in words."""
    wrong: dict[str, list[str]] = {"ids": [], "message": [], "extend_batch": []}
    looked = 0
    for turn in (FIRST[0], LATE[-1]):
        rows = [row.copy() for row in case.turns[turn][:CONVERSATIONS]]
        lists = run_ours_lists(case, [row.copy() for row in rows])
        theirs = run_renderers(case, rows) if case.renderer else [None] * len(rows)
        run_ours(case, rows)
        for row, listed, peer in zip(rows, lists, theirs, strict=True):
            looked += 1
            if listed != row.ids:
                wrong["extend_batch"].append(difference(case, row.ids, listed))
            if peer is None:
                continue
            answer, bridged = peer
            if bridged is None:
                wrong["ids"].append("renderers refuses the extension (None)")
            elif bridged.token_ids != row.ids:
                wrong["ids"].append(difference(case, row.ids, bridged.token_ids))
            message = row.messages[-1 - len(row.new)]
            calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            ours = (message["content"], message.get("reasoning_content"), calls)
            peers = (answer.content, answer.reasoning_content, [(c.name, c.arguments) for c in answer.tool_calls])
            if ours != peers:
                pairs = zip(("content", "reasoning", "calls"), ours, peers, strict=True)
                wrong["message"].append(
                    "; ".join(f"{key}: ours {shown(a)}, renderers {shown(b)}" for key, a, b in pairs if a != b)
                )
    return [f"{key}: {len(found)} of {looked} differ, e.g. {found[0]}" for key, found in wrong.items() if found]


def difference(case: Case, ours: list[int], theirs: list[int]) -> str:
    """The first place where two prompts part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
    )
    a, b = (case.tokenizer.decode(ids[at : at + 12]) for ids in (ours, theirs))
    return f"after {case.tokenizer.decode(ours[max(at - 4, 0) : at])!r} ours has {a!r}, the other {b!r}"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:28]}...{text[-28:]}"


# ---------------------------------------------------------------------- measuring
def measure(case: Case, batch: int, repeats: int, slow_repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a row of each system, at the first turns and at the late ones."""
    systems: dict[str, Callable[[Case, Sequence[Row]], Any]] = {"ours": run_ours, "ours, lists": run_ours_lists}
    if case.renderer:
        systems["renderers"] = run_renderers
    systems["transformers"] = run_transformers
    # A batch of one is measured on several rows, one by one.
    groups = [slice(i, i + 1) for i in range(16)] if batch == 1 else [slice(0, batch)]
    few = [slice(i, i + 1) for i in range(4)] if batch == 1 else [slice(0, 4)]
    spent: dict[str, dict[int, list[float]]] = {key: {turn: [] for turn in case.turns} for key in systems}
    for repeat in range(-1, repeats):
        for key, run in systems.items():
            slow = key == "transformers"
            if slow and repeat >= slow_repeats:
                continue
            gc.collect()  # no system pays for another's garbage; each pays for its own
            for turn, rows in case.turns.items():
                for group in few if slow else groups:
                    state = [row.copy() for row in rows[group]]
                    if key == "ours":
                        state = [row.on_tape() for row in state]
                    if slow:  # it is handed the conversation with the answer and what follows
                        for row, parsed in zip(state, read(case, [r.copy() for r in state]), strict=True):
                            row.messages += [parsed.message, *row.new]
                    start = time.perf_counter()
                    run(case, state)
                    seconds = time.perf_counter() - start
                    if repeat >= 0:
                        spent[key][turn].append(seconds / len(state) * 1e6)
    return {
        key: {
            "first": statistics.mean(statistics.median(of[turn]) for turn in FIRST),
            "late": statistics.mean(statistics.median(of[turn]) for turn in LATE),
        }
        for key, of in spent.items()
    }


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every family with every kind of turn, one after the other, each with what makes it."""
    corpus = Path(os.environ.get("TORCHRL_CHAT_SHARED", "../shared")) / "corpus"
    if corpus.is_dir():
        sys.path.insert(0, str(corpus.resolve()))
        from corpus import load

        chosen = args.families or (QUICK if args.quick else FAMILIES)
        for name in chosen:
            family, tokenizer = FAMILIES[name], load(FAMILIES[name].template)
            yield f"{name}, user", lambda f=(name, family, tokenizer): Case(*f, False, BATCHES[-1])
            if family.call:
                yield f"{name}, tool", lambda f=(name, family, tokenizer): Case(*f, True, BATCHES[-1])
        return
    from env_throughput import CHATML, train_tokenizer

    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    family = Family("", None, "{answer}<|im_end|>")
    yield "ChatML, user", lambda: Case("ChatML", family, tokenizer, False, BATCHES[-1])


def criteria(table: list[dict[str, Any]]) -> dict[str, Any]:
    """How the figures stand to what is promised: twice as fast as renderers, and flat."""
    speed = [
        (row["us"]["renderers"][when] / row["us"]["ours"][when], row["case"], when)
        for row in table
        if "renderers" in row["us"]
        for when in ("first", "late")
    ]
    growth = [(row["us"]["ours"]["late"] / row["us"]["ours"]["first"], row["case"]) for row in table]
    return {
        "times renderers, lowest": min(speed, default=None),
        "times renderers, median": statistics.median(s[0] for s in speed) if speed else None,
        "turn 64 / turn 1, highest": max(growth),
        "turn 64 / turn 1, median": statistics.median(g[0] for g in growth),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{row['case']:22s}"]
    for key in SYSTEMS:
        if (us := row["us"].get(key)) is None:
            cells.append(f"{'-':>7s} {'-':>7s} {'-':>5s}")
        else:
            cells.append(f"{us['first']:7,.0f} {us['late']:7,.0f} {us['late'] / us['first']:5.2f}")
    for key in ("renderers", "transformers"):
        us, ours = row["us"].get(key), row["us"]["ours"]
        cells.append(
            f"{us['first'] / ours['first']:5.1f} {us['late'] / ours['late']:6.1f}" if us else f"{'-':>12s}"
        )
    return "  ".join(cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="only these (default: all)")
    parser.add_argument("--parallel", action="store_true", help="let the tokenizer use every core")
    parser.add_argument("--quick", action="store_true", help="fewer families and repetitions, under a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if args.parallel else "false"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore")
    repeats, slow_repeats = (3, 1) if args.quick else (15, 3)
    table: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    heads = ("us a row", *SYSTEMS, "x renderers", "x transformers")
    widths = (22, 21, 21, 21, 21, 12, 12)
    say("  ".join(f"{h:^{w}s}" if i else f"{h:{w}s}" for i, (h, w) in enumerate(zip(heads, widths, strict=True))))
    say(f"{'family, turn, batch':22s}" + "    turn 1 turn 64 ratio"[1:] * 4 + "  turn 1     64  turn 1     64")
    for name, make in cases(args):
        try:
            case = make()
        except BridgeError as error:
            notes[name] = [f"ours refuses: {error}"]
            continue
        notes[name] = compare(case)
        if case.renderer is None:
            notes[name].append(f"renderers: {case.why_not}")
        gc.collect()
        gc.freeze()  # the interpreter's own objects; otherwise every system pays for scanning them
        for batch in BATCHES:
            table.append({"case": f"{name}, {batch}", "us": measure(case, batch, repeats, slow_repeats)})
            say(line(table[-1]))
        gc.unfreeze()
    result = {
        "unit": "microseconds a row",
        "turns": {"first": FIRST, "late": LATE},
        "threads": os.cpu_count() if args.parallel else 1,
        "renderers": version("renderers"),
        "transformers": version("transformers"),
        "table": table,
        "differences": notes,
        "criteria": criteria(table),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"\nOurs and renderers {result['renderers'] or '(not installed)'}, the same turn:")
    for name, found in notes.items():
        print(f"  {name}: " + (f"\n  {' ' * len(name)}  ".join(found) or "same ids, same message"))
    print("\n" + verdict(result["criteria"]))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def verdict(measured: dict[str, Any]) -> str:
    """The two criteria, with the figures."""
    growth, where = measured["turn 64 / turn 1, highest"]
    flat = f"turn 64 / turn 1 is {measured['turn 64 / turn 1, median']:.2f} (highest {growth:.2f}: {where})"
    if measured["times renderers, lowest"] is None:
        return f"Criteria: at least 2 times renderers: not measured. Flat: {flat}."
    lowest, case, when = measured["times renderers, lowest"]
    return (
        f"Criteria: at least 2 times renderers: {'yes' if lowest >= 2 else 'NO'}, median "
        f"{measured['times renderers, median']:.1f}, lowest {lowest:.1f} ({case}, {when} turns). "
        f"Flat: {'yes' if growth <= 1.25 else 'NO'}, {flat}."
    )


if __name__ == "__main__":
    main()
