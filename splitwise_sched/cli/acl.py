"""``splitwise-sched acl TOPIC``: the access rules that a topic's processes need, for the server's owner."""

from __future__ import annotations

import re
from typing import Literal

import click
from pydantic import Field, SecretStr, field_validator

from splitwise_sched.acl import ServerKind, acl_command, acl_file
from splitwise_sched.cli.options import settings_command
from splitwise_sched.settings import ExplicitSettings

_USER = re.compile(r"[A-Za-z0-9._-]{1,64}")


class AclSettings(ExplicitSettings):
    """Whose rules, and for which kind of server."""

    user: str = Field("splitwise", description="Name of the user; it becomes --scheduler-username.")
    user_password: SecretStr | None = Field(
        None, description="Its password, which is printed as a hash. Left out: change-me, to be changed."
    )
    server_kind: ServerKind = Field(
        "redis",
        description="redis: a server, also behind Sentinels; cluster: the same for each node of a Cluster; sentinel: "
        "the Sentinels themselves.",
    )
    format: Literal["file", "setuser"] = Field(
        "file", description="file: lines of the server's aclfile; setuser: a command for redis-cli."
    )

    @field_validator("user")
    @classmethod
    def _user_is_a_name(cls, value: str) -> str:
        if not _USER.fullmatch(value):
            raise ValueError("it must be 1 to 64 characters of A-Z a-z 0-9 . _ -")
        return value


@settings_command(AclSettings, name="acl")
@click.argument("topic")
def command(settings: AclSettings, topic: str) -> None:
    """Print the rules of a Redis user that can do what splitwise-sched needs on one topic, and nothing else.

    The ACL of a Cluster's node is its own: give the rules to every node, and to every server behind Sentinels.
    """
    secret = settings.user_password
    password = None if secret is None else secret.get_secret_value()
    write = acl_file if settings.format == "file" else acl_command
    click.echo(write(topic, settings.user, settings.server_kind, password), nl=False)
    if password is None:
        click.echo("the password is change-me: change it, or give --user-password", err=True)
