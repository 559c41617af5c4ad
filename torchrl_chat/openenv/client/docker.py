"""An OpenEnv server in a Docker container, for as long as a client needs it."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Mapping, Sequence

from torchrl_chat.openenv.client.errors import ConnectFailed

_PORT = 8000  # where the server listens in every image of OpenEnv
_COMMAND_SECONDS = 600.0  # the image may have to be pulled first


class Container:
    """A running container whose server answers ``/health``.

    It is removed by :meth:`remove`, when this object is collected, and when the interpreter ends.

    Args:
        image: the name of the image.
        env: environment variables of the container.
        options: further arguments for ``docker run``.
        start_timeout: seconds until the server has to be healthy.

    Raises:
        ConnectFailed: there is no ``docker``, it reports an error, or the server does not get healthy; the text has the last
            lines of the container's log.
    """

    def __init__(
        self,
        image: str,
        *,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        start_timeout: float = 30.0,
    ):
        variables = [part for name, value in (env or {}).items() for part in ("-e", f"{name}={value}")]
        # Docker chooses the port itself: nobody can take it in between.
        command = ["run", "-d", "-p", f"127.0.0.1::{_PORT}", *variables, *options, image]
        self.id = _run(*command).split()[-1]
        self._remove = weakref.finalize(self, _remove, self.id, os.getpid())
        try:
            host = _run("port", self.id, str(_PORT)).split()[0]
            self.url = f"http://{host}"
            self._wait(image, start_timeout)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Stop and remove the container."""
        self._remove()

    def _wait(self, image: str, patience: float) -> None:
        give_up, last = time.monotonic() + patience, "no answer"
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2.0) as answer:
                    if answer.status == 200:
                        return
                    last = f"status {answer.status}"
            except (urllib.error.URLError, OSError, ValueError) as error:
                last = str(error)
            running = _run("inspect", "-f", "{{.State.Running}}", self.id).strip() == "true"
            if not running or time.monotonic() >= give_up:
                log = _run("logs", "--tail", "20", self.id).strip()
                state = f"is not healthy after {patience:g} s ({last})" if running else "ended by itself"
                raise ConnectFailed(f"the server of the image {image!r} {state}. Its log ends with:\n{log}")
            time.sleep(0.1)


def _run(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, errors="replace", timeout=_COMMAND_SECONDS
        )
    except FileNotFoundError as error:
        raise ConnectFailed("there is no command 'docker': a server from an image needs Docker.") from error
    if done.returncode:
        raise ConnectFailed(
            f"`docker {' '.join(arguments)}` failed ({done.returncode}): {done.stderr.strip()[-500:]}"
        )
    return done.stdout if arguments[0] != "logs" else done.stdout + done.stderr


def _remove(container: str, owner: int) -> None:
    if os.getpid() != owner:  # a forked child, whose parent goes on with it
        return
    subprocess.run(["docker", "rm", "-f", container], capture_output=True, timeout=60.0)
