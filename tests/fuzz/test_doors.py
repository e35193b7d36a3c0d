"""The short forms of `make fuzz-requests` and `make fuzz-records`."""

from tests.fuzz import records, requests

GROWTH_MAX_NBYTES = 64 << 20


def test_no_request_through_either_door_is_a_defect_or_touches_anothers_values(daemon_factory):
    daemon = daemon_factory(server='tokens = "{dir}/tokens.toml"\ntoken_on_unix = true', start=False)
    requests.configure(daemon)
    requests.start(daemon)
    report = requests.run(daemon, 1800, seed=1)
    assert report.surprises == []
    assert sum(report.sent.values()) >= 1800
    assert report.checks >= 8 * len(report.samples) > 0
    assert {"lease answer", "lease InvalidEntry", "grpc OK", "grpc UNAUTHENTICATED"} <= set(report.answers)
    assert report.samples[-1][1] - report.samples[0][1] < GROWTH_MAX_NBYTES
    assert daemon.stop() == 0
    assert requests.errors_in(daemon.log) == []


def test_no_mutated_record_is_more_than_refused_where_it_is_read_or_imported():
    assert {records.cold_read(data) for data in records.seeds()} == {"decoded"}
    report = records.run(4000, seed=1)
    assert report.surprises == []
    assert {"cold refused", "cold decoded", "import refused", "parser attrs"} <= set(report.outcomes)
    assert report.samples[-1][1] - report.samples[0][1] < GROWTH_MAX_NBYTES
