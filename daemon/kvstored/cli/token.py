"""`kvstored token`: a new token for a caller, and its entry in the tokens file."""

import click

from kvstored.cli.exits import BadUsage


@click.command()
@click.argument("name")
@click.option("--right", "rights", multiple=True, type=click.Choice(["read", "write", "admin"]),
              default=("read", "write"), show_default=True, help="May be given several times.")  # fmt: skip
@click.option("--tenant", help="Only this tenant's keys.  [default: the whole key space]")
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, writable=True), help="The file for the token, mode 0600."
)
def token(name: str, rights: tuple[str, ...], tenant: str | None, output: str | None) -> None:
    """Make a token for NAME. Prints the entry for the daemon's tokens file; the token itself is shown only once.

    Add the entry to the file of server.tokens, reload the daemon, give the caller the token in a file, and set the
    caller's KVSTORED_TOKEN_FILE to that file.
    """
    import os

    from kvstored.access.tokens import digest, make_token

    if tenant and "admin" in rights:
        raise BadUsage("the admin right sees every tenant, so it cannot go with --tenant")
    made = make_token()
    lines = ["[[token]]", f'name = "{name}"', f'sha256 = "{digest(made)}"',
             f"rights = [{', '.join(chr(34) + right + chr(34) for right in rights)}]"]  # fmt: skip
    if tenant:
        lines.insert(3, f'tenant = "{tenant}"')
    if output:
        try:
            with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(made + "\n")
        except OSError as error:
            raise BadUsage(f"{output}: {error.strerror}") from None
    else:
        # On standard error: redirecting the entry into the tokens file must not write the token there.
        click.echo(f"token: {made}", err=True)
    click.echo("\n".join(lines))


COMMANDS = (token,)
