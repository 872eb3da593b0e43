"""Own models: arrays to arrays, and nothing about adaptation or files."""

from lowrank.models.encoder import Classifier as Classifier
from lowrank.models.encoder import Encoder as Encoder
from lowrank.models.encoder import EncoderSpec as EncoderSpec
from lowrank.models.zoo import SIZES as SIZES
