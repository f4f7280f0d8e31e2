"""Where `training_args.bin` of earlier versions finds its class."""

from trl_kd.trainers.pbkd.config import PbKDConfig as PbKDConfig
