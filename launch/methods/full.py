"""Full fine-tuning: no adapters, all parameters are trained, embeddings and head included."""

from launch.methods.base import Method

METHOD = Method(trains_all=True)
