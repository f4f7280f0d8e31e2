"""Sources of answers, the same for teacher and student: a dataset column, a local model, vLLM, a server."""

from trl_kd.sampling.sampler import Answer, Request, Sampler, SamplingSettings, Text


__all__ = ["Answer", "Request", "Sampler", "SamplingSettings", "Text"]
