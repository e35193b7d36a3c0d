"""Settings: where they come from, in which order, and what is refused."""

import pytest

from kvstore.errors import ConfigError
from kvstored.settings import load_settings


def write(tmp_path, text):
    path = tmp_path / "kvstored.toml"
    path.write_text(text)
    return path


def test_defaults_need_no_file_and_no_environment(tmp_path):
    settings = load_settings(environ={"RUNTIME_DIRECTORY": str(tmp_path), "STATE_DIRECTORY": str(tmp_path / "state")})
    assert settings.server.targets == (f"unix:{tmp_path}/kvstored.sock",)
    assert settings.store.cold.path == str(tmp_path / "state" / "cold")


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path):
    path = write(tmp_path, '[server]\naddress = "unix:/file"\nsilence_s = 1\n[store.hot]\ncapacity_nbytes = "1MiB"\n')
    environ = {"KVSTORED_SERVER__ADDRESS": "unix:/environment", "KVSTORED_STORE__HOT__CAPACITY_NBYTES": "2MiB"}
    assert load_settings(path, environ={}).server.address == "unix:/file"
    settings = load_settings(path, environ=environ)
    assert settings.server.address == "unix:/environment"
    assert settings.store.hot.capacity_nbytes == 2 << 20
    assert settings.server.silence_s == 1.0
    settings = load_settings(path, environ=environ, address="unix:/argument", data_dir="/data")
    assert settings.server.address == "unix:/argument"
    assert settings.store.cold.path == "/data/cold"


def test_the_clients_address_variable_serves_the_daemon_too_and_is_no_setting():
    assert load_settings(environ={"KVSTORED_ADDRESS": "unix:/shared"}).server.address == "unix:/shared"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nadress = 'unix:/x'", "unknown setting server.adress; did you mean server.address"),
        ("[sever]\nx = 1", "unknown setting sever; did you mean server"),
        ("[server]\nsilence_s = 0", "server.silence_s must be from 0.05"),
        ("[server]\nthreads = 'many'", "server.threads must be int"),
        ("[server]\naddress = 'nowhere'", "server.address: not an address: 'nowhere'"),
        ("[server]\naddress = ','", "names nothing to listen on"),
        ("server = 1", "server is a table of settings"),
        ("[server]\naddress = 'tcp:0.0.0.0:7411'", "without TLS.*insecure_tcp = true"),
        ("[server]\naddress = 'tcp:cache.example.org:7411'", "without TLS"),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(write(tmp_path, text), environ={})


def test_an_unknown_variable_of_a_table_is_refused():
    with pytest.raises(ConfigError, match=r"server\.adress"):
        load_settings(environ={"KVSTORED_SERVER__ADRESS": "x"})
    with pytest.raises(ConfigError, match="silence_s is a setting"):
        load_settings(environ={"KVSTORED_SERVER__SILENCE_S": "1", "KVSTORED_SERVER__SILENCE_S__X": "1"})


def test_tcp_beyond_this_host_is_served_only_when_asked_for(tmp_path):
    tokens = {"KVSTORED_SERVER__TOKENS": "tokens.toml"}
    for address in ("tcp:127.0.0.1:1", "tcp:localhost:1", "tcp:[::1]:1"):
        assert load_settings(environ=tokens, address=address).server.targets
        with pytest.raises(ConfigError, match=r"set server\.tokens"):
            load_settings(environ={}, address=address)
    path = write(tmp_path, "[server]\naddress = 'tcp:0.0.0.0:7411'\ninsecure_tcp = true")
    assert load_settings(path, environ={}).server.targets == ("0.0.0.0:7411",)
