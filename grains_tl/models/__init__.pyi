from .loading import load_hugging_face as load_hugging_face
from .loading import load_model as load_model
from .loading import wrap_model as wrap_model

__all__: list[str]
