"""What the name of a model says before anything of it is read."""

from pathlib import Path


def looks_like_path(name: str) -> bool:
    """Whether `name` cannot be the id of a Hub repository, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def check_no_adapter(field: str, name: str) -> None:
    """Raises a `ValueError` if the model that `field` names is the folder of an adapter alone, which has no config."""
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(
            f"`{field}` is {name!r}, an adapter: merge it into its base model (`merge_and_unload` of PEFT) and save that, "
            "or pass the model as a `PeftModel` object."
        )
