"""How much a vision-language model says that is not in the picture: yes/no questions, captions, judged answers.

The measures take plain answers and margins, so they serve any model; the readers take the published files as they are.
"""

from grains_tl.hallucination.captions import CaptionScores, caption_hallucination
from grains_tl.hallucination.judges import chat_judge, judge_answers, rating_prompt, read_rating
from grains_tl.hallucination.readers import (
    ImageQuestion,
    JudgedQuestion,
    YesNoQuestion,
    load_mmhal,
    load_mmmu,
    load_pope,
    load_spa_vl,
)
from grains_tl.hallucination.yes_no import YesNoScores, preference_win_rate, read_yes_no, yes_no_scores, yes_no_table

__all__ = [
    "CaptionScores",
    "ImageQuestion",
    "JudgedQuestion",
    "YesNoQuestion",
    "YesNoScores",
    "caption_hallucination",
    "chat_judge",
    "judge_answers",
    "load_mmhal",
    "load_mmmu",
    "load_pope",
    "load_spa_vl",
    "preference_win_rate",
    "rating_prompt",
    "read_rating",
    "read_yes_no",
    "yes_no_scores",
    "yes_no_table",
]
