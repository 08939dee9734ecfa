from . import export as export
from .build import build_vectors as build_vectors
from .building import BuildingRecords as BuildingRecords
from .combined import CombinedSteering as CombinedSteering
from .differences import Differences as Differences
from .differences import collect_differences as collect_differences
from .files import load_vectors as load_vectors
from .fisher import Fisher as Fisher
from .foreign import vectors_from as vectors_from
from .foreign import with_resid_norms as with_resid_norms
from .gradients import MarginGradient as MarginGradient
from .grains import Grains as Grains
from .kl_optimal import KLOptimal as KLOptimal
from .readout import read_out as read_out
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .reduce import reduce_vectors as reduce_vectors
from .steering import Steering as Steering
from .steering_vectors import SteeringVectors as SteeringVectors
from .trained import Trained as Trained
from .word_directions import word_vectors as word_vectors
from .words import without_words as without_words

__all__: list[str]
