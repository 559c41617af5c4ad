"""The routes of the page that plays an environment: its files, and the ledger of a session as the page draws it.

The viewer of rollout files stands beside it, and shares who may come in, its headers and its law: texts never become markup
(:mod:`torchrl_chat.viewer.routes`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from torchrl_chat.conversation import Transcript
from torchrl_chat.openenv.protocol import ProtocolError, dumps
from torchrl_chat.openenv.web.socket import TokenSocket
from torchrl_chat.pieces import TokenPieces
from torchrl_chat.rollouts import sequence as written_sequence
from torchrl_chat.viewer.files import RolloutFiles
from torchrl_chat.viewer.routes import HEADERS, STATIC, Handler, Static, viewer_routes

Answerer = Callable[[list[int]], tuple[list[int], list[float]]]
"""A policy for the page: prompt ids -> sampled ids and their log-probs."""


def web_routes(
    tokenizer: Any = None, *, rollouts: str | os.PathLike[str] | None = None, policy: Answerer | None = None
) -> list[BaseRoute]:
    """The page's routes, for ``create_app(..., extra_routes=web_routes(tokenizer))``: ``/web`` and what stands under it.

    The files of the page are for everybody who reaches the port: they hold no secret. Whatever tells of sessions or of
    files asks for the server's token, as every route does.

    Args:
        tokenizer: of the environment, for the text of each token; ``None`` shows ids only.
        rollouts: a folder of rollout files (``*.jsonl``, in subfolders too) that the page may open, or one such file.
        policy: answers in the person's place, where the person asks for it; called in a thread, one call at a time.

    Raises:
        ValueError: there is no such folder or file.

    Example:
        >>> from torchrl_chat import ChatTemplate
        >>> from torchrl_chat.openenv import ChatEnvironment, create_app
        >>> from torchrl_chat.tiny import TEXT_ALPHABET, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer(TEXT_ALPHABET)
        >>> template = ChatTemplate(tokenizer)
        >>> app = create_app(lambda: ChatEnvironment(template), extra_routes=web_routes(tokenizer))
    """
    return _Page(tokenizer, None if rollouts is None else RolloutFiles(rollouts), policy).routes()


class _Page:
    def __init__(self, tokenizer: Any, rollouts: RolloutFiles | None, policy: Answerer | None):
        self._spell = None if tokenizer is None else TokenPieces(tokenizer)
        self._rollouts = rollouts
        self._policy = policy
        self._turn = asyncio.Lock()
        self._static = Static(packages=[("torchrl_chat.openenv.web", "static"), STATIC])

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/web/", self._static.page("index.html")),
            Route("/web/config", self._guarded(self.config)),
            Route("/web/ledger", self._guarded(self.ledger)),
            Route("/web/answer", self._guarded(self.answer), methods=["POST"]),
            WebSocketRoute("/web/ws", TokenSocket()),
            *viewer_routes(self._rollouts, self._guarded, self._static),
        ]

    # ------------------------------------------------------------------ what the page asks
    async def config(self, request: Request) -> Response:
        """What this server has."""
        return _json(
            {
                "env": getattr(request.app.state, "env_name", None),
                "policy": self._policy is not None,
                "rollouts": None if self._rollouts is None else self._rollouts.name,
            }
        )

    async def ledger(self, request: Request) -> Response:
        """The token sequences of a session, each as the rollout file has it; none for an environment without them."""
        transcript = self._transcript(request)
        if transcript is None:
            return _json({"sequences": []})
        written = [
            await asyncio.to_thread(written_sequence, branch, self._spell, transcript.scored)
            for branch in transcript.sequences
        ]
        return _json({"sequences": written})

    async def answer(self, request: Request) -> Response:
        """What the policy answers to a session's prompt; the page sends it as an action of its own."""
        if self._policy is None:
            raise HTTPException(404, "this server has no model that answers.")
        transcript = self._transcript(request)
        if transcript is None or not len(transcript) or transcript.ended is not None:
            raise HTTPException(409, "it is not the policy's turn.")
        async with self._turn:
            try:
                tokens, log_probs = await asyncio.to_thread(self._policy, transcript.token_array.tolist())
            except Exception as error:  # of any model: the person is told, the page goes on
                raise HTTPException(
                    500, f"the model has no answer: {type(error).__name__}: {error}"[:2000]
                ) from error
        return _json({"tokens": tokens, "log_probs": log_probs})

    # ------------------------------------------------------------------ how it is found
    def _transcript(self, request: Request) -> Transcript | None:
        """The ledger of a session's environment; ``None`` where it has none, or none yet."""
        session = request.app.state.sessions.find(request.query_params.get("session_id"))
        return getattr(session.env, "transcript", None)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            refusal = request.app.state.guard.refusal(request)
            if refusal is not None:
                return _json({"detail": refusal[1]}, refusal[0])
            try:
                return await handler(request)
            except HTTPException as error:
                return _json({"detail": error.detail}, error.status_code)
            except ProtocolError as error:
                return _json({"detail": error.message, "code": str(error.code)}, 404)  # no such session

        return guarded


def _json(value: Any, status: int = 200) -> Response:
    return Response(dumps(value), status, HEADERS, "application/json")
