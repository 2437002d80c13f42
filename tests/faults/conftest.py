"""The embedded server and its environment, as the tests of the pipeline have them."""

from tests.pipeline.conftest import embedded_server, no_aws, s3_environment

__all__ = ["embedded_server", "no_aws", "s3_environment"]
