"""What the environment says, and what it must not say."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from splatc.config import Config, parse_size, start_logging
from splatc.errors import InvalidInput


def test_defaults():
    config = Config.from_env({"SPLATC_DUMP": "", "SPLATC_CACHE_DIR": " "})
    assert config.cache_dir.name == "splatc" and config.cache_dir.is_absolute()
    assert config.cache_size == 2 << 30
    assert not config.disable_cache and not config.dump and config.log_level is None and config.arch is None


def test_every_variable(tmp_path):
    config = Config.from_env(
        {
            "SPLATC_CACHE_DIR": str(tmp_path / "new"),
            "SPLATC_DISABLE_CACHE": "Yes",
            "SPLATC_DUMP": "ir, PTX,",
            "SPLATC_DUMP_DIR": "~/dump",
            "SPLATC_LOG_LEVEL": "Info",
            "SPLATC_ARCH": "sm_90a",
            "SPLATC_CUDA_COMPILER": "NVCC",
            "SPLATC_GRADIENT_WALKS": "Two",
            "SPLATC_LINE_INFO": "1",
            "SPLATC_CACHE_SIZE": "500MB",
            "SPLATC_COSTS": __file__,
        }
    )
    assert config == Config(
        cache_dir=tmp_path / "new",
        dump_dir=Path.home() / "dump",
        disable_cache=True,
        cache_size=500_000_000,
        dump=frozenset({"ir", "ptx"}),
        log_level=logging.INFO,
        arch="sm_90a",
        cuda_compiler="nvcc",
        gradient_walks="two",
        line_info=True,
        costs=Path(__file__),
    )


def test_the_environment_is_read_when_asked(monkeypatch):
    monkeypatch.setenv("SPLATC_ARCH", "sm_80")
    assert Config.from_env().arch == "sm_80"
    monkeypatch.setenv("SPLATC_ARCH", "sm_100")
    assert Config.from_env().arch == "sm_100"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1048576", 1 << 20), ("500MB", 500_000_000), ("2 GiB", 2 << 30), ("1.5k", 1500)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SPLATC_CACHE_SIZE", "-1"),
        ("SPLATC_CACHE_SIZE", "lots"),
        ("SPLATC_CACHE_SIZE", "5 XB"),
        ("SPLATC_CACHE_DIR", __file__),
        ("SPLATC_CACHE_DIR", "~no-such-user-here/x"),
        ("SPLATC_DISABLE_CACHE", "maybe"),
        ("SPLATC_DUMP", "ir,sass"),
        ("SPLATC_DUMP_DIR", __file__),
        ("SPLATC_LOG_LEVEL", "loud"),
        ("SPLATC_ARCH", "sm_90a; rm"),
        ("SPLATC_ARCH", "../x"),
        ("SPLATC_CUDA_COMPILER", "clang"),
        ("SPLATC_GRADIENT_WALKS", "three"),
        ("SPLATC_COSTS", "/nowhere/costs.json"),
        ("SPLATC_COSTS", os.path.dirname(__file__)),
    ],
)
def test_bad_values_name_the_variable_in_one_line(name, text):
    with pytest.raises(InvalidInput, match=name) as info:
        Config.from_env({name: text})
    assert "\n" not in str(info.value)


def test_logging_starts_once_and_only_when_asked(monkeypatch):
    logger = logging.getLogger("splatc")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    try:
        start_logging(None)
        assert not logger.handlers
        start_logging(logging.INFO)
        start_logging(logging.DEBUG)
        assert len(logger.handlers) == 1 and logger.level == logging.DEBUG
    finally:
        logger.setLevel(level)
