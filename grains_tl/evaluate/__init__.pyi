from . import harness as harness
from .choosing import Choice as Choice
from .choosing import choose as choose
from .choosing import report_choice as report_choice
from .controls import Comparison as Comparison
from .controls import compare_with_controls as compare_with_controls
from .costs import text_costs as text_costs
from .equal_cost import effect_at_kl as effect_at_kl
from .generation_tables import generation_quality as generation_quality
from .generations import compare_generations as compare_generations
from .measuring import measure as measure
from .measuring import next_token_kl as next_token_kl
from .parallel import shared_sweep as shared_sweep
from .quality import retention as retention
from .quality import text_quality as text_quality
from .records import record_effects as record_effects
from .records import two_sided as two_sided
from .settings import Setting as Setting
from .settings import grid as grid
from .summary import summarize as summarize
from .sweeps import sweep as sweep
from .sweeps import sweep_records as sweep_records

__all__: list[str]
