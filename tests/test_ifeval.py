"""IFEval: the published vectors, each kind of instruction both ways, the rows of the dataset, bad rows, hostile text."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from conftest import need_shared
from growth import assert_linear
from hypothesis import given
from hypothesis import strategies as st

from torchrl_chat.rewards.ifeval import FIGURES, IFEvalVerifier, figures, followed, variants
from torchrl_chat.rewards.instructions import INSTRUCTIONS, LANGUAGES, count_sentences
from torchrl_chat.rewards.instructions.checks import capital_words
from torchrl_chat.rewards.verdict import level_of

LANGUAGE_KINDS = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase"}

# Vectors that contradict the paper, and why.
WRONG_VECTORS = {
    ("detectable_format:json_format", 'Here is the JSON:\n```json\n{"key": "value"}\n```'): (
        "the instruction is 'Entire output should be wrapped in JSON format'; with an introduction before the fence "
        "only loose grading accepts it, as the paper's own implementation does"
    ),
}


def row(*instructions: tuple[str, dict]) -> dict:
    return {"instruction_id_list": [i for i, _ in instructions], "kwargs": [k for _, k in instructions]}


def follows(kind: str, kwargs: dict, response: str) -> bool:
    if kind in LANGUAGE_KINDS:
        pytest.importorskip("py3langid")
    [result] = followed(response, row((kind, kwargs)))
    return result.strict


def vectors() -> list[dict]:
    return [json.loads(line) for line in need_shared("data/graders/ifeval.jsonl").read_text().splitlines()]


def dataset() -> list[dict]:
    return [json.loads(line) for line in need_shared("data/ifeval/input_data.jsonl").read_text().splitlines()]


def test_vectors_of_the_benchmark():
    wrong = []
    cases = [case for case in vectors() if case["in_benchmark"]]
    assert len(cases) > 50
    for case in cases:
        expected = case["expected"]
        if (case["instruction_id"], case["response"]) in WRONG_VECTORS:
            expected = not expected
        if follows(case["instruction_id"], case["kwargs"], case["response"]) != expected:
            wrong.append(case)
    assert not wrong


def test_the_vector_that_is_wrong_is_right_in_loose_grading():
    for kind, response in WRONG_VECTORS:
        [result] = followed(response, row((kind, {})))
        assert (result.strict, result.loose) == (False, True)


def test_vectors_outside_the_benchmark_are_of_kinds_that_the_paper_took_out():
    for case in vectors():
        if not case["in_benchmark"]:
            assert case["instruction_id"] not in INSTRUCTIONS
            with pytest.raises(ValueError, match=f"'{case['instruction_id']}' is no IFEval instruction"):
                follows(case["instruction_id"], case["kwargs"], case["response"])


GERMAN = "Heute gehen wir mit unseren Freunden ins Museum."
ENGLISH = "Today we go to the museum with our friends."
# (kind, arguments, responses that follow it, responses that do not)
BOTH_WAYS = [
    ("keywords:existence", {"keywords": ["cat", "C++"]}, ["C++ and Category"], ["cat, C+", "C++"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, ["War, toward"], ["war"]),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 1, "relation": "less than"}, ["acb"], ["A.B"]),
    ("keywords:forbidden_words", {"forbidden_words": ["can", "c++"]}, ["candle", "c+"], ["I CAN.", "in C++!"]),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, ["qQ"], ["q"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 4, "let_relation": "at least"}, ["####"], ["aaaa"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, ["hi"], ["hi!"]),
    ("language:response_language", {"language": "de"}, [GERMAN], [ENGLISH, "12 * 3!", "***"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["Hi Dr. Lee."], ["A! B."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***\na *** b\n***"],
     ["a\n\nb", "a\n***\n***\nb", "***"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, ["it's it"], ["it's its it"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hi"},
     ["a\n\nhi b", "a\n\n\n\n\"HI, b", "\n\na\n\nHi."], ["a\nhi", "hi\n\na", "a\n\nhip", "a\n\nhi\n\nb", "hi"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]", "[[a] []"], ["[a] [b", "[\n] [a]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\np. s. b", "P.P.S. a"], ["PS: a", "P.S a"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP. P. S. b", "P.P.S"], ["P.S. a"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b", "x\n  -a\n *b"],
     ["* a", "* a\n* b\n* c", "***\n* a", "+ a\n+ b"]),
    ("detectable_format:constrained_response", {}, ["So: My answer is maybe."], ["My answer is Maybe.", "Yes."]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* **b**"], ["*a* ** **", "*a\nb* *c*"]),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, ["Day 1 a Day2"],
     ["Day 1", "DAY 1 DAY 2", "Day one Day two"]),
    ("detectable_format:json_format", {}, ['{"a": [1]}', "```JSON\n{}\n```", "```\n[]\n```", "3"],
     ['{"a": 1', "Here: {}", "```json\n```", "{} {}", "[" * 100_000]),
    ("detectable_format:title", {}, ["<<a>>", "x\n<<<a>>> b"], ["<a>", "<< >>", "<<a\n>>", "<<>>", ">>a<<"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b******"],
     ["a", "a******a", "a******b******c", "a************b", "******a******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, ["\nSAY hi. Hi"], ["Hi. Say hi.", "Say"]),
    ("startend:end_checker", {"end_phrase": "Peace!"}, ['a "Peace!"', "peace!\n"], ["Peace", "Peace! b"]),
    ("startend:quotation", {}, ['"a"', ' "a" b"\n'], ['"', '"a', "“a”", "'a'"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
     ["I see NASA", "DON'T"], ["I see Nasa", "i'm IN"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper(), "123"]),
    ("change_case:english_lowercase", {}, [ENGLISH.lower()], [ENGLISH, GERMAN.lower(), "123"]),
    ("punctuation:no_comma", {}, ["a; b، c"], ["a,b"]),
]  # fmt: skip


def test_every_kind_is_tried():
    assert len(INSTRUCTIONS) == 25
    assert {case[0] for case in BOTH_WAYS} == set(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("kind", "kwargs", "good", "bad"), BOTH_WAYS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_both_ways(kind, kwargs, good, bad):
    assert [follows(kind, kwargs, response) for response in good] == [True] * len(good)
    assert [follows(kind, kwargs, response) for response in bad] == [False] * len(bad)
    assert not follows(kind, kwargs, "  \n ")


@pytest.mark.parametrize(
    ("relation", "verdicts"),
    [("at least", [0, 1, 1]), ("less than", [1, 0, 0]), ("at most", [1, 1, 0]), ("more than", [0, 0, 1])],
)
def test_relations(relation, verdicts):
    kwargs = {"num_words": 2, "relation": relation}
    responses = ["a", "a b", "a b c"]
    assert [follows("length_constraints:number_words", kwargs, response) for response in responses] == verdicts


def test_a_threshold_of_zero_is_kept():
    assert not follows("keywords:frequency", {"keyword": "a", "frequency": 0, "relation": "more than"}, "b")
    assert follows("keywords:frequency", {"keyword": "a", "frequency": 0, "relation": "at most"}, "b")


SENTENCES = [
    ("Dr. Smith met Mr. J. R. Jones at 10 a.m. on Jan. 5. They talked.", 2),
    ("It costs $3.50, i.e. less than 4.5 euros, e.g. in Paris.", 1),
    ("Wait... what? Yes... The end!", 3),
    ("He lives in the U.S. The town is small.", 2),
    ("He lives in the U.S. now, at Acme Inc. in Ohio.", 1),
    ("“Stop.” She did. 'Why?' he said.", 4),
    ("Really?! (Yes.) **No.** Fine", 4),
    ("See Fig. 3 and No. 5, pp. 3-4. The answer is no. Good.", 3),
    ("apples, pears, etc. are fruit, plums etc. All of them.", 2),
    ("Visit www.example.com or a.b. now", 1),
    ("Two rules (1. do it now; 2. do it well) hold.", 1),
    ("1. Buy milk.\n2. Drink it.", 4),
    ("i have 3. it is enough", 2),
    ("as much vitamin C. Eat well, George P. Smith", 2),
    ("Great! 😊", 1),
    ("**All bold.**", 1),
    ("a title\n\nand no period", 1),
    ("今日は晴れ。明日は雨！", 2),
    ("!!! ... ???", 0),
    ("", 0),
]


@pytest.mark.parametrize(("text", "count"), SENTENCES)
def test_sentences(text, count):
    assert count_sentences(text) == count


@given(st.lists(st.sampled_from(["We ate", "it rained all day", "is 3.5 more than 3", "Ms. Li left"]), max_size=20))
def test_sentences_add_up(pieces):
    assert count_sentences(" ".join(piece + "." for piece in pieces)) == len(pieces)
    assert count_sentences("\n".join(piece + "?!" for piece in pieces)) == len(pieces)


@given(st.text(alphabet="aB1.?!… \n\"')*", max_size=60), st.text(alphabet="aB1.?!… \n\"')*", max_size=60))
def test_a_paragraph_more_is_never_a_sentence_less(a, b):
    together = count_sentences(f"{a}! {b}")
    assert (
        max(count_sentences(a), count_sentences(b)) <= together <= count_sentences(a + "!") + count_sentences(b) + 1
    )


def test_capital_words():
    assert capital_words("I'm at NASA's WELL-KNOWN site, U.S.A., a TV3") == 5
    assert capital_words("DON'T STOP, it IS O.K") == 5


LANGUAGE_SAMPLES = {
    "en": ["The response is English", "hello world 123", "HELLO WORLD", "MY ANSWER IS YES.", "every letter is lowercase."],
    "de": [GERMAN, "Guten Tag"],
    "pt": ["Hoje vamos visitar o museu com os meus amigos e depois comer um bolo."],
    "it": ["Oggi visitiamo il museo con i nostri amici e poi mangiamo la pizza."],
    "es": ["Hoy vamos a visitar el museo con mis amigos."],
    "fr": ["Aujourd'hui nous visitons le Louvre avec nos amis."],
    "ru": ["Сегодня мы идём в музей с друзьями, а потом едим пиццу."],
    "bg": ["Днес ще посетим музея с приятелите си и след това ще ядем пица."],
    "uk": ["Сьогодні ми йдемо до музею з друзями, а потім їмо піцу."],
    "hi": ["आज हम अपने दोस्तों के साथ संग्रहालय जा रहे हैं और फिर खाना खाएंगे।", "मैं ठीक हूँ"],
    "mr": ["आज आम्ही आमच्या मित्रांसोबत संग्रहालयात जात आहोत आणि मग जेवण करू.", "मी ठीक आहे"],
    "ne": ["आज हामी हाम्रा साथीहरूसँग संग्रहालय जाँदैछौं र त्यसपछि खाना खानेछौं।", "म ठीक छु"],
    "bn": ["আজ আমরা বন্ধুদের সাথে জাদুঘরে যাচ্ছি।"],
    "kn": ["ಇಂದು ನಾವು ಸ್ನೇಹಿತರೊಂದಿಗೆ ವಸ್ತುಸಂಗ್ರಹಾಲಯಕ್ಕೆ ಹೋಗುತ್ತಿದ್ದೇವೆ."],
    "te": ["ఈ రోజు మేము స్నేహితులతో మ్యూజియంకు వెళ్తున్నాము."],
    "ta": ["இன்று நாங்கள் நண்பர்களுடன் அருங்காட்சியகம் செல்கிறோம்."],
    "gu": ["આજે અમે મિત્રો સાથે સંગ્રહાલય જઈ રહ્યા છીએ."],
    "pa": ["ਅੱਜ ਅਸੀਂ ਦੋਸਤਾਂ ਨਾਲ ਅਜਾਇਬ ਘਰ ਜਾ ਰਹੇ ਹਾਂ।"],
    "ml": ["ഇന്ന് ഞങ്ങൾ സുഹൃത്തുക്കളോടൊപ്പം മ്യൂസിയത്തിൽ പോകുന്നു."],
    "fa": ["امروز با دوستانمان به موزه می‌رویم و سپس غذا می‌خوریم."],
    "ur": ["آج ہم اپنے دوستوں کے ساتھ عجائب گھر جا رہے ہیں۔"],
    "ar": ["اليوم نذهب إلى المتحف مع أصدقائنا ثم نأكل الطعام."],
    "he": ["היום אנחנו הולכים למוזיאון עם החברים שלנו."],
    "th": ["วันนี้เราจะไปพิพิธภัณฑ์กับเพื่อน ๆ แล้วกินข้าว"],
    "ko": ["오늘 우리는 친구들과 박물관에 갑니다."],
    "vi": ["Hôm nay chúng tôi đi bảo tàng với bạn bè rồi ăn cơm."],
    "sw": ["Leo tunaenda makumbusho na marafiki zetu kisha tutakula chakula.", "Habari ya asubuhi, rafiki yangu"],
    "fi": ["Tänään menemme museoon ystäviemme kanssa ja sitten syömme pizzaa."],
    "ja": ["今日は友達と博物館に行きます。"],
    "pl": ["Dzisiaj idziemy do muzeum z przyjaciółmi, a potem jemy pizzę."],
    "zh-cn": ["今天我们和朋友一起去博物馆。"],
}  # fmt: skip


@pytest.mark.parametrize("code", LANGUAGE_SAMPLES)
def test_languages(code):
    other = "en" if code != "en" else "de"
    for sample in LANGUAGE_SAMPLES[code]:
        assert follows("language:response_language", {"language": code}, sample)
        assert not follows("language:response_language", {"language": other}, sample)


def test_every_language_of_the_dataset_is_told_apart():
    wanted = {kwargs["language"] for line in dataset() for kwargs in line["kwargs"] if "language" in kwargs}
    assert len(wanted) > 20
    assert wanted <= LANGUAGES & set(LANGUAGE_SAMPLES)


def test_without_the_language_library_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['py3langid'] = None; sys.modules['py3langid.langid'] = None\n"
        "from torchrl_chat.rewards.instructions.language import is_language\n"
        "assert not is_language('123', 'en')\n"
        "try: is_language('abc', 'en')\n"
        "except ImportError as error: assert \"pip install 'torchrl_chat[ifeval]'\" in str(error); print('named')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "named"


def test_every_row_is_graded_and_the_hub_form_alike():
    pytest.importorskip("py3langid")
    names = sorted({name for kind in INSTRUCTIONS.values() for name in kind.arguments})
    lines = dataset()
    assert len(lines) == 541
    verify = IFEvalVerifier()
    for line in lines:
        hub = {**line, "kwargs": [{**dict.fromkeys(names), **kwargs} for kwargs in line["kwargs"]]}
        for response in (line["prompt"], "", "Yes, *sure*.\n\nP.S. No."):
            verdict = verify(response, line)
            assert verdict == verify(response, hub)
            parts = verdict.parts
            assert parts["instructions"] == len(line["instruction_id_list"])
            assert parts["prompt_strict"] == verdict.score == float(verdict.correct)
            assert parts["prompt_strict"] <= parts["prompt_loose"] <= parts["instruction_loose"]
            assert parts["prompt_strict"] <= parts["instruction_strict"] <= parts["instruction_loose"] <= 1.0


TWO = row(("punctuation:no_comma", {}), ("startend:quotation", {}), ("detectable_format:title", {}))


def test_figures_and_scores():
    response = 'Sure, here it is:\n"<<Hello>>"'  # strict: the title alone; loose: each of the three
    parts = IFEvalVerifier()(response, TWO).parts
    assert [parts[name] for name in FIGURES] == [0.0, pytest.approx(1 / 3), 1.0, 1.0]
    for name in FIGURES:
        assert IFEvalVerifier(score=name)(response, TWO).score == parts[name]
    assert IFEvalVerifier(score="torchrl")(response, TWO).score == pytest.approx(0.3 / 3 + 0.2 + 0.1)
    assert IFEvalVerifier(score="prompt_loose")(response, TWO).correct is False


def test_blank_responses_follow_nothing():
    verdict = IFEvalVerifier()(" \n", TWO)
    assert (verdict.score, verdict.answer, set(list(verdict.parts.values())[:4])) == (0.0, None, {0.0})


def test_figures_of_a_data_set():
    verify = IFEvalVerifier()
    verdicts = [verify("a, b", row(("punctuation:no_comma", {}))), verify('"<<a>>"', TWO)]
    assert figures(verdicts) == {
        "prompt_strict": 0.5,
        "instruction_strict": 0.75,
        "prompt_loose": 0.5,
        "instruction_loose": 0.75,
    }
    with pytest.raises(ValueError, match="one or more"):
        figures([])


def test_variants():
    assert list(variants("one\n*two*\nthree")) == [
        "one\n*two*\nthree", "one\ntwo\nthree", "*two*\nthree", "two\nthree", "one\n*two*", "one\ntwo", "*two*", "two",
    ]  # fmt: skip
    assert list(variants("one")) == ["one"]
    assert list(variants("")) == []


@given(st.text(alphabet="ab*, \n", max_size=40))
def test_variants_drop_lines_and_asterisks_only(response):
    found = list(variants(response))
    assert len(found) <= 8
    assert len(set(found)) == len(found)
    assert all(variant.strip() for variant in found)
    assert not found or found[0] == response
    for variant in found:
        assert variant.replace("*", "").strip() in response.replace("*", "")


@given(st.text(max_size=200))
def test_any_text_is_graded(response):
    reference = row(*((kind, kwargs) for kind, kwargs, _, _ in BOTH_WAYS if kind not in LANGUAGE_KINDS))
    results = followed(response, reference)
    assert all(result.loose or not result.strict for result in results)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("x", "a row of the dataset, a mapping; got 'x'"),
        ({}, "needs the list 'instruction_id_list'; got None"),
        ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "needs the list 'instruction_id_list'"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "needs the list 'kwargs'"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "got 0 for the 1 of"),
        ({"instruction_id_list": [], "kwargs": []}, "at least one"),
        (row(("punctuation:no_colon", {})), "'punctuation:no_colon' is no IFEval instruction; the known ones"),
        (row(("punctuation:no_comma", "x")), "'punctuation:no_comma' must be a mapping; got 'x'"),
        (row(("punctuation:no_comma", {"n": 1})), "'punctuation:no_comma' does not take the argument 'n'"),
        (row(("keywords:frequency", {"keyword": "a"})), "'keywords:frequency' needs the argument 'frequency'"),
        (row(("keywords:existence", {"keywords": "a"})), "argument 'keywords' is 'a', but must be a list of texts"),
        (row(("keywords:existence", {"keywords": [""]})), "argument 'keywords' is"),
        (row(("keywords:letter_frequency", {"letter": "ab"})), "argument 'letter' is 'ab', but must be a single"),
        (row(("startend:end_checker", {"end_phrase": " "})), "argument 'end_phrase' is ' ', but must be a text"),
        (row(("language:response_language", {"language": "tlh"})), "argument 'language' is 'tlh', but must be the ISO"),
        (row(("detectable_format:number_bullet_lists", {"num_bullets": 1.5})), "argument 'num_bullets' is 1.5"),
        (row(("detectable_format:number_bullet_lists", {"num_bullets": True})), "argument 'num_bullets' is True"),
        (row(("detectable_format:number_bullet_lists", {"num_bullets": float("nan")})), "'num_bullets' is nan"),
        (row(("length_constraints:number_words", {"num_words": 3, "relation": "about"})), "'relation' is 'about'"),
        (
            row(("length_constraints:nth_paragraph_first_word",
                 {"num_paragraphs": 1, "nth_paragraph": 0, "first_word": "a"})),
            "argument 'nth_paragraph' is 0, but must be a whole number, 1 or more",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("response", ["", "Hello."])
def test_bad_rows_are_errors_that_name_the_key(reference, message, response):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is looked at below
        IFEvalVerifier()(response, reference)
    assert message in str(error.value)


def test_counts_may_be_floats_of_a_table():
    assert follows("detectable_format:number_bullet_lists", {"num_bullets": 1.0}, "* a")


def test_the_verifier_is_a_plain_value():
    verify = IFEvalVerifier(score="torchrl")
    assert level_of(verify) == "text"
    assert pickle.loads(pickle.dumps(verify)) == verify
    with pytest.raises(ValueError, match=r"score='strict'.*'prompt_strict'"):
        IFEvalVerifier(score="strict")


@pytest.mark.parametrize(
    "unit",
    ["[", "<<", "<", "*", "* ", "**a", ".", ". ", "! ", ".) ", "a.", "A. ", "\n", "-\n", "'", "A'", "```json", "p. ",
     "?!x", '."', "e.g. ", "SECTION 1", "******", "{", '{"a":', "P. ", "\\", "，"],
)  # fmt: skip
def test_time_is_linear_in_hostile_text(unit):
    reference = row(*((kind, kwargs) for kind, kwargs, _, _ in BOTH_WAYS if kind not in LANGUAGE_KINDS))
    assert_linear(lambda text: followed(f"x{text}\ny", reference), unit * (100_000 // len(unit)))


def test_the_import_is_light():
    code = (
        "import sys; import torchrl_chat.rewards.ifeval\n"
        "from torchrl_chat.rewards.ifeval import followed\n"
        "followed('Hi.', {'instruction_id_list': ['punctuation:no_comma'], 'kwargs': [{}]})\n"
        "print([name for name in ('torchrl', 'numpy', 'py3langid', 'nltk') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
