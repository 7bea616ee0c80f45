"""The commands of launch/README.md are commands that the launchers take."""

import re
import shlex


def test_commands_of_the_readme(stage):
    stage.program("git", "print('0' * 40)\n")
    text = (stage.root / "launch" / "README.md").read_text().replace("\\\n", " ")
    blocks = [line.split("  #")[0].strip() for line in text.splitlines() if line.startswith("    python launch/")]
    inline = re.findall(r"`(python launch/[^`]*)`", text)
    assert len(blocks) >= 9 and len(inline) >= 2
    for command in [*blocks, *inline]:
        _, launcher, *arguments = shlex.split(command)
        done = stage.run(launcher.removeprefix("launch/").removesuffix(".py"), "--dry-run", *arguments)
        assert done.returncode == 0 and done.stdout and not done.stderr, (command, done.stderr)
        assert stage.bash_accepts(done.stdout)
