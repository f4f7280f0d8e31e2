"""Where `training_args.bin` of earlier versions finds its class."""

from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig as OnlinePbKDConfig
