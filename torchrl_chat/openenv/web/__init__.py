"""The web page: an environment played by hand, and rollout files looked at. Plain files, served as they are."""

try:
    from torchrl_chat.openenv.web.routes import viewer_app, web_routes
except ModuleNotFoundError as error:
    raise ImportError(f"the web page needs {error.name}: pip install 'torchrl_chat[serve]'") from error

__all__ = ["viewer_app", "web_routes"]
