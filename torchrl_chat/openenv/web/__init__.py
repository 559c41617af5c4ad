"""The web page: an environment played by hand, and the viewer of rollout files beside it. Plain files, served as they are."""

try:
    from torchrl_chat.openenv.web.routes import web_routes
except ModuleNotFoundError as error:
    raise ImportError(f"the web page needs {error.name}: pip install 'torchrl_chat[serve]'") from error

__all__ = ["web_routes"]
