from .loading import load_model as load_model

__all__: list[str]
