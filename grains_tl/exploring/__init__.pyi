from .api import explore as explore
from .views import View as View
from .widget import Explorer as Explorer

__all__: list[str]
