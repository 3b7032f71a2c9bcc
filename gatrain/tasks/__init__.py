"""Tasks: what gatrain trains. Use a ready one, or subclass `Task` for anything else."""

from gatrain.tasks.base import Task
from gatrain.tasks.contrastive import Contrastive
from gatrain.tasks.gan import GAN
from gatrain.tasks.huggingface import HuggingFace
from gatrain.tasks.language_model import LanguageModel
from gatrain.tasks.supervised import Supervised
from gatrain.tasks.window import WindowTask

__all__ = ["GAN", "Contrastive", "HuggingFace", "LanguageModel", "Supervised", "Task", "WindowTask"]
