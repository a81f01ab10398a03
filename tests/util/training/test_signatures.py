"""Signatures beside records and audits, as ssh-keygen makes them."""

import shutil
import subprocess

import pytest

from util.training.record_check import NAMESPACE, _signed

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")


@pytest.fixture
def signed(tmp_path):
    """A file with its signature, and allowed signers: `ours` with several names and namespaces, `theirs`."""
    for name in ("ours", "theirs"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", tmp_path / name], check=True)
        (tmp_path / f"{name}.txt").write_text(
            f'dpo@x.org,{name}@x.org namespaces="file" {(tmp_path / f"{name}.pub").read_text()}'
        )
    file = tmp_path / "task_1.json"
    file.write_text("{}\n")
    sign = ["ssh-keygen", "-q", "-Y", "sign", "-f", tmp_path / "ours", "-n", NAMESPACE, file]
    subprocess.run(sign, check=True, capture_output=True)
    return file, file.with_name("task_1.json.sig"), {name: tmp_path / f"{name}.txt" for name in ("ours", "theirs")}


def test_a_signature_holds_and_says_whose_it_is(signed):
    file, signature, signers = signed
    so, found = _signed(file, signature, None)
    assert so and found.startswith('Good "file" signature with ED25519 key SHA256:')
    so, found = _signed(file, signature, signers["ours"])
    assert so and found.startswith('Good "file" signature for dpo@x.org with ED25519 key SHA256:')


def test_a_signature_of_somebody_else_fails(signed):
    file, signature, signers = signed
    assert _signed(file, signature, signers["theirs"]) == (False, "No principal matched.")


@pytest.mark.parametrize("who", [None, "ours"])
def test_a_changed_file_or_signature_fails(signed, who):
    file, signature, signers = signed
    file.write_text("{} \n")
    assert _signed(file, signature, signers.get(who)) == (False, "Signature verification failed: incorrect signature")
    signature.write_text("nothing")
    assert _signed(file, signature, signers.get(who))[0] is False


def test_without_ssh_keygen_it_cannot_be_told(signed, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert _signed(*signed[:2], None) == (None, "no ssh-keygen here: install OpenSSH")
