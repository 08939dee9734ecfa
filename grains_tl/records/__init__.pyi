from .benchmarks import Benchmark as Benchmark
from .benchmarks import load_benchmark as load_benchmark
from .choices import MultipleChoice as MultipleChoice
from .choices import letters as letters
from .loading import load_bundled as load_bundled
from .loading import load_pairs as load_pairs
from .loading import neutral_texts as neutral_texts
from .pairs import PreferencePair as PreferencePair
from .splits import split_records as split_records

__all__: list[str]
