"""What lets somebody in, a key, a password in a URL, a header, is in no log, warning, rollout file, config or repr."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import warnings

import pytest
from tensordict import TensorDict

from torchrl_chat import ChatEnv, DatasetChatEnv, Grader, UserSimulator, columns, play
from torchrl_chat.endpoint import HIDDEN, Secrets, shown_url, without_login
from torchrl_chat.policies.endpoint import EndpointPolicy
from torchrl_chat.rewards import Episode, LLMJudge
from torchrl_chat.rollouts import write_rollouts
from torchrl_chat.transforms import EndpointUser

KEY = "sk-0123456789abcdef"
PASSWORD = "pass word/ü9"
HEADER = "header-value-42"
WITHIN = "pass%20word%2F%C3%BC9"


def secret(text: str) -> bool:
    from torchrl_chat.endpoint import basic

    spelled = (KEY, PASSWORD, WITHIN, HEADER, basic("me", PASSWORD)[6:], json.dumps(PASSWORD)[1:-1])
    return any(word in text for word in spelled)


def url_of(endpoint) -> str:
    return endpoint.url.replace("http://", f"http://me:{WITHIN}@")


def settings(endpoint, **more):
    extra = {"extra_headers": {"X-Gate": f"Token {HEADER}"}}
    return {"base_url": url_of(endpoint), "api_key": KEY, "extra": extra, "retries": 0, **more}


@pytest.fixture
def echoing(endpoint):
    """An endpoint that answers with an error that repeats all that it was sent, the long way round."""
    endpoint.heard = []

    def script(body, number):
        said = f"{'.' * (244 - number)} {KEY} {PASSWORD} {WITHIN} {HEADER} {json.dumps(PASSWORD)}"
        return 401, json.dumps({"error": {"message": said, "code": 401}}).encode()

    endpoint.script = script
    return endpoint


@pytest.fixture
def told(caplog):
    """All that is logged and warned, by us and by the libraries, at every level."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpcore", "torchrl_chat"):
        caplog.set_level(logging.DEBUG, logger=name)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield lambda: caplog.text + "".join(str(warning.message) for warning in warned)


def one_row():
    return ChatEnv(batch_size=(2,)), TensorDict(query=["a", "b"], batch_size=(2,))


class TestEchoes:
    def test_a_policy(self, echoing, told, tmp_path):
        policy = EndpointPolicy("m", **settings(echoing))
        env, start = one_row()
        finished = play(env, policy, env.reset(start))
        errors = columns.read_objects(finished["policy_error"], finished.batch_size)
        assert all(HIDDEN in error for error in errors)
        write_rollouts(tmp_path / "rollouts.jsonl", finished)
        shown = [*errors, (tmp_path / "rollouts.jsonl").read_text(), repr(policy), str(policy), told()]
        assert not any(map(secret, shown))
        policy.close()

    def test_a_judge(self, echoing, told):
        judge = LLMJudge("m", **settings(echoing))
        with Grader(judge) as grader:
            [verdict] = grader.grade([Episode.of("4", "4")])
        assert HIDDEN in verdict.failure
        assert not any(map(secret, (verdict.failure, repr(judge), f"{[judge]}", told())))
        assert "rubric=None" in repr(judge)
        with pytest.raises(ValueError, match="cannot be sent as JSON") as raised:
            LLMJudge("m", extra={"extra_headers": {"X-Gate": HEADER}, "x": object()})
        assert not secret(str(raised.value))

    def test_a_user(self, echoing, told):
        user = EndpointUser("m", **settings(echoing))
        env = DatasetChatEnv(dataset=[{"query": "a"}]).append_transform(UserSimulator(user))
        td = env.reset()
        rows = [columns.history_messages([{"role": "assistant", "content": "x"}])]
        td["history"] = columns.histories("response", rows, td.batch_size, None)
        stepped = env.step(td)["next"]
        [failure] = columns.read_objects(stepped["user_failure"], stepped.batch_size)
        assert HIDDEN in failure
        assert not any(map(secret, (failure, repr(user), told())))
        env.close()

    def test_log_probs_of_a_server(self, echoing):
        from torchrl_chat.transforms import CompletionsReference

        reference = CompletionsReference(url_of(echoing), "m", api_key=KEY)
        with pytest.raises(RuntimeError, match="answered 401") as raised:
            reference.ask([[1, 2]])
        assert KEY not in str(raised.value)
        assert WITHIN not in str(raised.value)

    @pytest.mark.parametrize("text", [f"the key is {KEY}", f"so: {HEADER}"])
    def test_an_answer_that_repeats_them_is_none(self, text, endpoint, told):
        endpoint.script = lambda body, number: text
        policy = EndpointPolicy("m", **settings(endpoint))
        env, start = one_row()
        finished = play(env, policy, env.reset(start))
        errors = columns.read_objects(finished["policy_error"], finished.batch_size)
        assert all("repeats a key or a password" in error for error in errors)
        assert not any(map(secret, [*errors, str(finished), told()]))
        policy.close()
        with pytest.raises(ValueError, match="repeats a key") as raised:
            asyncio.run(EndpointUser("m", **settings(endpoint))([{"role": "user", "content": "a"}]))
        assert not secret(str(raised.value))

    def test_what_is_sent_is_what_it_was(self, endpoint):
        """Hidden, not lost: the server is told the password and the header, and sees no login in a path."""
        seen = []
        handle = endpoint.RequestHandlerClass.do_POST

        def post(self):
            seen.append(({name.title(): value for name, value in self.headers.items()}, self.path))
            handle(self)

        endpoint.RequestHandlerClass = type("Listening", (endpoint.RequestHandlerClass,), {"do_POST": post})
        policy = EndpointPolicy("m", **settings(endpoint))
        env, start = one_row()
        policy(env.reset(start))
        policy.close()
        from torchrl_chat.endpoint import basic

        for headers, path in seen:
            assert headers["Authorization"] == basic("me", PASSWORD)
            assert headers["X-Gate"] == f"Token {HEADER}"
            assert path == "/v1/chat/completions"
        assert len(seen) == 2

    def test_a_copy_in_another_process_has_them(self, endpoint):
        policy = pickle.loads(pickle.dumps(EndpointPolicy("m", **settings(endpoint))))
        assert policy.api_key == KEY
        assert not secret(repr(policy))


class TestAllRequestsFailed:
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("dataset", [False, True])
    def test_a_step_without_a_tokenizer(self, endpoint, rows, dataset):
        """No row is stepped: what stood there stands there, and the next step can be tried."""
        endpoint.script = lambda body, number: (500, b"{}") if number <= rows else "fine"
        policy = EndpointPolicy("m", endpoint.url, retries=0)
        queries = [f"question {i}" for i in range(rows)]
        if dataset:
            env = DatasetChatEnv(dataset=[{"query": q} for q in queries], num_envs=rows, shuffle=False)
            td = env.reset()
        else:
            env = ChatEnv(batch_size=(rows,))
            td = env.reset(TensorDict(query=queries, batch_size=(rows,)))
        before = columns.read_objects(td["transcript"], td.batch_size)
        td = policy(td)
        assert not td["_step"].any()
        stepped = env.step(td)
        following = stepped["next"]
        assert columns.read_objects(following["transcript"], td.batch_size) == before
        assert not following["done"].any()
        assert columns.read_field(following["history"], "response", td.batch_size) is None
        again = env.step(policy(env.step_mdp(stepped)))["next"]
        said = [t.messages[-1]["content"] for t in columns.read_objects(again["transcript"], td.batch_size)]
        assert said == ["fine"] * rows
        policy.close()


class TestShown:
    def test_urls(self):
        assert shown_url(None) is None
        assert shown_url("http://localhost:8000/v1") == "http://localhost:8000/v1"
        assert shown_url("https://a:b@h:1/v1?api-key=xyz&v=2") == f"https://{HIDDEN}@h:1/v1?api-key={HIDDEN}&v=2"
        assert without_login("http://h/v1") == ("http://h/v1", None)
        assert without_login("http://a:b%40@h:1/v1") == ("http://h:1/v1", "Basic YTpiQA==")

    def test_ordinary_words_stay(self):
        secrets = Secrets(["", "ab", "none", "EMPTY", "a longer one"])
        assert secrets.hide("none of ab, a longer one") == f"none of ab, {HIDDEN}"
        assert "EMPTY" not in secrets

    def test_of_the_environment(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:{WITHIN}@h/v1")
        judge = LLMJudge("m")
        assert secret(f"{KEY}")
        assert not secret(judge.secrets.hide(f"{KEY} {PASSWORD} {WITHIN}"))

    def test_tools_and_servers(self):
        from torchrl_chat.openenv.client.link import Link
        from torchrl_chat.tools.mcp_link import Server

        link = Link(url=f"http://me:{WITHIN}@h:1", headers={"Authorization": f"Bearer {KEY}"})
        server = Server(url=f"http://me:{WITHIN}@h:1", headers={"A": KEY}, env={"B": KEY})
        assert not secret(repr(link))
        assert not secret(str(server))
        with pytest.raises(ValueError, match="expected http") as raised:
            Link(url=f"ftp://me:{WITHIN}@h")
        assert not secret(str(raised.value))

    def test_the_settings_of_an_evaluation(self, tmp_path, endpoint, monkeypatch, capsys):
        """``config.json`` has no password; going on with the run asks for the URL again."""
        from torchrl_chat.cli.main import main

        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        endpoint.script = lambda body, number: "7"
        out = tmp_path / "run"
        url = url_of(endpoint)
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"query": "last(3,7)=", "answer": "7"}\n')
        common = ["eval", "--dataset", "digits", "--data", str(rows), "--backend", "endpoint", "--model", "m"]
        assert main([*common, "--endpoint", url, "--out", str(out)]) == 0
        held = "".join(path.read_text() for path in out.iterdir() if path.is_file())
        assert "127.0.0.1" in (out / "config.json").read_text()
        assert not secret(held)
        assert main(["eval", "--resume", str(out)]) != 0
        assert main(["eval", "--resume", str(out), "--endpoint", url]) == 0
        shown = capsys.readouterr()
        assert not secret(shown.out + shown.err)
