from .captions import CaptionScores as CaptionScores
from .captions import caption_hallucination as caption_hallucination
from .datasets import ImageQuestion as ImageQuestion
from .datasets import JudgedQuestion as JudgedQuestion
from .datasets import YesNoQuestion as YesNoQuestion
from .datasets import load_mmhal as load_mmhal
from .datasets import load_mmmu as load_mmmu
from .datasets import load_pope as load_pope
from .datasets import load_spa_vl as load_spa_vl
from .judges import chat_judge as chat_judge
from .judges import judge_answers as judge_answers
from .judges import rating_prompt as rating_prompt
from .judges import read_rating as read_rating
from .yes_no import YesNoScores as YesNoScores
from .yes_no import preference_win_rate as preference_win_rate
from .yes_no import read_yes_no as read_yes_no
from .yes_no import yes_no_scores as yes_no_scores
from .yes_no import yes_no_table as yes_no_table

__all__: list[str]
