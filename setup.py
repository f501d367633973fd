"""Packaging: ``pip install -e '.[dev]'``, or ``make setup``. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
PACKAGE = "megatron_router_upcycling"
# lm-eval imports accelerate without naming it; datasets before 4 could run code that comes with a data set.
EVALUATION = [
    "accelerate>=1.6,<2",
    "datasets>=4,<6",
    "lm-eval>=0.4.13,<0.5",
    "transformers>=5,<6",
]


def version() -> str:
    """The package's ``__version__``, read without importing it."""
    found = re.search(
        r'__version__ = "([^"]+)"', (HERE / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    )
    assert found, f"{PACKAGE}/__init__.py has no __version__"
    return found.group(1)


setup(
    name="megatron-router-upcycling",
    version=version(),
    description="Dense language models into Mixture-of-Experts by Router Upcycling, for Megatron-LM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={f"{PACKAGE}.evaluation": ["tasks/*.yaml"]},
    python_requires=">=3.12",
    # Lower bounds are what was tested; upper bounds end before the first version that was not.
    install_requires=[
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.11,<2.16",
        "matplotlib>=3.9,<4",
        "numpy>=2,<3",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "sentencepiece>=0.2,<0.3",
        "tensorboard>=2.18,<3",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "dev": [
            "hypothesis>=6.100,<7",
            "mypy>=1.15,<3",
            "pytest>=8,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.15,<0.18",
            "types-PyYAML>=6,<7",
            *EVALUATION,
        ],
        "eval": EVALUATION,
        # NVIDIA's apex is used when it can be imported; the package of that name on PyPI is another one.
        "gpu": ["transformer-engine[pytorch]>=2.11,<3"],
        "hf": ["transformers>=4.51,<6"],
    },
    entry_points={"console_scripts": ["router-upcycle = megatron_router_upcycling.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
