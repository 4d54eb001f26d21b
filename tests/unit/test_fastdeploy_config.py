"""The configuration has FastDeploy's names and defaults, and says what has no effect."""

from __future__ import annotations

import logging

import pytest

from splitwise_sched.errors import ConfigError, SplitwiseError
from splitwise_sched.fastdeploy import Request, SplitWiseSchedulerConfig
from splitwise_sched.fastdeploy.admission import ChunkedPrefill


def test_defaults_are_those_of_the_interface():
    config = SplitWiseSchedulerConfig()
    assert (config.redis_host, config.redis_port, config.redis_password) == ("127.0.0.1", 6379, None)
    assert (config.redis_topic, config.ttl, config.expire_period, config.sync_period) == ("fd", 900, 3.0, 5)
    assert (config.release_load_expire_period, config.clear_expired_nodes_period) == (600, 60)
    assert (config.reader_parallel, config.reader_batch_size) == (4, 200)
    assert (config.writer_parallel, config.writer_batch_size) == (4, 200)
    assert config.nodeid != SplitWiseSchedulerConfig().nodeid
    settings = config.settings()
    assert (settings.instance_lease_s, settings.scheduler_ttl, settings.scheduler_max_size) == (3.0, 900, -1)


def test_arguments_may_be_given_by_place_in_the_interface_s_order():
    config = SplitWiseSchedulerConfig("n", "h", 1, "pw", "t", 10, 20, 5, 4000, 60, 4, 200, 4, 200)
    assert (config.nodeid, config.redis_topic, config.ttl, config.expire_period) == ("n", "t", 10, 4.0)
    password = config.settings().scheduler_password
    assert password is not None and password.get_secret_value() == "pw"


def test_options_without_effect_are_accepted_and_told_of_when_they_were_changed(caplog):
    SplitWiseSchedulerConfig(sync_period=5, writer_parallel=4)
    assert caplog.text == ""
    config = SplitWiseSchedulerConfig(sync_period=50, writer_parallel=8, min_load_score=1, load_shards_num=2, unknown=3)
    assert [r.message.split(" ")[0] for r in caplog.records] == [
        "sync_period=50", "writer_parallel=8", "min_load_score=1", "load_shards_num=2",
    ]  # fmt: skip
    assert config.others == {"unknown": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl": 0}, "scheduler_ttl is 0"),
        ({"port": 70_000}, "scheduler_port is 70000"),
        ({"nodeid": "a b"}, "node id 'a b' is not usable"),
        ({"topic": "{x}"}, "topic id '{x}' is not usable"),
        ({"release_load_expire_period": 0}, "release_load_expire_period is 0: it must be 1 or more"),
        ({"enable_chunked_prefill": True}, r"long_prefill_token_threshold is 0.*max_model_len given"),
        ({"enable_chunked_prefill": True, "max_num_partial_prefills": None}, "max_num_partial_prefills is None"),
        ({"request_class": int}, r"it must be a class with from_dict"),
    ],
)
def test_option_that_cannot_work_is_refused_with_its_value(options, message):
    with pytest.raises(SplitwiseError, match=message):
        SplitWiseSchedulerConfig(**options)


def test_chunked_prefill_takes_four_percent_of_the_longest_input_as_long():
    options = {"enable_chunked_prefill": True, "max_model_len": 1000, "max_num_partial_prefills": 3}
    assert SplitWiseSchedulerConfig(**options).chunked_prefill() == ChunkedPrefill(3, 1, 40)
    options["long_prefill_token_threshold"] = 7
    assert SplitWiseSchedulerConfig(**options).chunked_prefill() == ChunkedPrefill(3, 1, 7)
    assert SplitWiseSchedulerConfig(max_model_len=1000).chunked_prefill() is None


def test_check_looks_again_at_what_was_changed_later():
    config = SplitWiseSchedulerConfig(request_class=Request)
    config.ttl = -1
    with pytest.raises(ConfigError, match="scheduler_ttl is -1"):
        config.check()


def test_print_logs_every_option_but_the_password(caplog):
    caplog.set_level(logging.INFO)
    SplitWiseSchedulerConfig(password="hidden-word", topic="shown").print()
    assert "shown" in caplog.text and "hidden-word" not in caplog.text
