from .api import find_vector as find_vector
from .auditing import Audit as Audit
from .auditing import audit as audit
from .exportable import AsAdd as AsAdd
from .exportable import as_add as as_add
from .planning import RunPlan as RunPlan
from .planning import plan_run as plan_run
from .prediction import predict_effect as predict_effect
from .result import Found as Found
from .text_rules import praise as praise
from .text_rules import refuses as refuses
from .wording import WordingTest as WordingTest
from .wording import wording_table as wording_table
from .workload import Workload as Workload

__all__: list[str]
