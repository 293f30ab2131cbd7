"""The prompt lab: a text, the features that fire on it, and why the model says what it says.

`routes` answers; `state` is what an address holds; `reading` turns the worker's answers into what is shown.
"""

from app.web.prompt.routes import router

__all__ = ["router"]
