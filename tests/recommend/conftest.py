"""The configurations that plans are tested with."""

from tests.planning.conftest import config_folder, planned_recipe  # noqa: F401
