"""Where `training_args.bin` of earlier versions finds its class."""

from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig as MMPbKDConfig
