"""Package data that pyproject.toml cannot name: prompts and weights, as data of minigpt4._data."""

from setuptools import find_packages, setup

DATA = {
    "prompts": ["*.txt"],
    "weights": ["README.md", "nano*.safetensors", "mini*.safetensors", "centernet-*"],
}

setup(
    packages=[*find_packages(include=["minigpt4*"]), *(f"minigpt4._data.{name}" for name in DATA)],
    package_dir={f"minigpt4._data.{name}": name for name in DATA},
    package_data={
        "minigpt4": [
            "py.typed",
            "**/*.c",
            "**/*.h",
            "**/*.css",
            "**/*.html",
            "**/*.jpg",
            "**/*.js",
            "**/*.json",
        ]
        + ["**/*.json", "**/*.jsonl", "**/*.md", "**/*.txt"],
        **{f"minigpt4._data.{name}": patterns for name, patterns in DATA.items()},
    },
)
