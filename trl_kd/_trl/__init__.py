"""Everything that trl-kd uses of TRL and transformers and that is private to them. Importing this package imports neither.

- `models`: how models are loaded, wrapped and read;
- `seams`: which methods and attributes of TRL's trainers our trainers override and use;
- `tested`: the tested range of releases, and one sentence for a name that is gone.
"""
