"""Emoji: scenes composed of emoji of several vendors on photographs, generated from a seed."""

from region_pretrain.data.emoji.dataset import SPLIT_VENDORS, EmojiSpec, emoji
from region_pretrain.data.emoji.scene import (
    LEVELS,
    Difficulty,
    get_difficulty,
    render_scene,
)
from region_pretrain.data.emoji.vendors import CLASSES, VENDORS

__all__ = [
    "CLASSES",
    "LEVELS",
    "SPLIT_VENDORS",
    "VENDORS",
    "Difficulty",
    "EmojiSpec",
    "emoji",
    "get_difficulty",
    "render_scene",
]
