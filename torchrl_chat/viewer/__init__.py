"""Rollout files in the browser: conversations, tokens, trees, curves, two runs side by side (``docs/viewer.md``)."""

try:
    from torchrl_chat.viewer.routes import STATIC, viewer_app, viewer_routes
except ModuleNotFoundError as error:
    raise ImportError(f"the viewer needs {error.name}: pip install 'torchrl_chat[serve]'") from error

__all__ = ["STATIC", "viewer_app", "viewer_routes"]
