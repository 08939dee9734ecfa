"""Recipes for steering directions beside each other: three models, five sets, at equal KL, over building draws."""
