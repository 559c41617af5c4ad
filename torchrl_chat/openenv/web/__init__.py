"""The web page: an environment played by hand, and rollout files looked at. Plain files, served as they are."""

from torchrl_chat.openenv.web.routes import viewer_app, web_routes

__all__ = ["viewer_app", "web_routes"]
