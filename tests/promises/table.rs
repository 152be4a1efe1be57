//! Promise by promise: which tests show it. What two sections of the README and of the guide say,
//! sentence by sentence, what other parts of them say about running programs, and each field of the YAML
//! file.

use std::collections::BTreeSet;
use std::path::Path;

/// The files in which promises are made. The first one has the section "What it promises".
const TEXTS: &[&str] = &[
    "README.md",
    "src/guide/when_etcd_is_away.md",
    "src/guide/getting_started.md",
    "src/guide/concepts.md",
    "src/guide/configuration.md",
    "src/guide/routing.md",
    "src/guide/edge.md",
    "src/guide/scale.md",
];

/// A promise, as its text begins, and the tests that show it: `crate::module::test`.
const PROMISES: &[(&str, &[&str])] = &[
    // "What it promises", in the README.
    (
        "At most one leader.",
        &[
            "promises::members::a_leader_that_stood_still_does_not_lead_when_it_goes_on",
            "cluster::election::twenty_nodes_come_and_go_with_always_a_valid_leader",
        ],
    ),
    (
        "Leadership ends at a local deadline",
        &[
            "promises::members::a_leader_that_stood_still_does_not_lead_when_it_goes_on",
            "cluster::faults::a_leader_cut_off_gives_up_before_another_is_elected",
        ],
    ),
    (
        "Every term has a token greater than all before it.",
        &[
            "promises::members::a_leader_that_stood_still_does_not_lead_when_it_goes_on",
            "proxy::programs::leader_routing_as_the_readme_runs_it",
        ],
    ),
    (
        "The deadline trusts the clock's rate",
        &["cluster::election::a_write_with_the_guard_of_an_ended_term_is_not_carried_out"],
    ),
    (
        "A worker comes back, whatever took its lease",
        &[
            "promises::members::a_worker_comes_back_whatever_took_its_lease_and_leaves_within_two_seconds",
        ],
    ),
    (
        "Its shutdown takes at most 2 s, and never removes the entry of a process that took its id over.",
        &[
            "promises::members::a_worker_comes_back_whatever_took_its_lease_and_leaves_within_two_seconds",
            "promises::members::a_worker_that_leaves_does_not_remove_who_took_its_id_over",
        ],
    ),
    (
        "A balancer keeps its last view while etcd is away, resumes after, and lists again when history was compacted.",
        &[
            "promises::away::the_last_view_is_served_resumed_and_listed_again_after_a_compaction",
            "promises::logs::a_log_that_cannot_be_written_costs_nothing_but_its_lines",
            "promises::deaths::a_balancer_whose_discovery_panics_says_so_and_goes_on",
            "proxy::outage::an_outage_of_etcd_and_a_mass_expiry_cost_no_request",
        ],
    ),
    (
        "A connection that goes silent is noticed within 5 s",
        &["promises::away::silence_is_noticed_within_five_seconds_and_the_next_endpoint_is_tried"],
    ),
    (
        "It starts without etcd, if it has a snapshot file",
        &[
            "promises::snapshot::the_snapshot_is_there_within_a_second_and_serves_a_start_without_etcd",
        ],
    ),
    (
        "A mass expiry does not empty the pool.",
        &[
            "promises::fields::a_mass_expiry_does_not_empty_the_pool_while_requests_succeed",
            "proxy::outage::an_outage_of_etcd_and_a_mass_expiry_cost_no_request",
        ],
    ),
    (
        "When more than 30 % of the nodes (and at least three) vanish within 10 s",
        &["promises::fields::a_mass_expiry_does_not_empty_the_pool_while_requests_succeed"],
    ),
    (
        "An update of metrics touches neither health nor enablement of a backend.",
        &["proxy::drop_in::a_down_backend_stays_down_when_its_weight_changes"],
    ),
    (
        "What was learned of backends outlives the process",
        &[
            "promises::learned::a_successor_begins_with_what_its_predecessor_has_learned",
            "promises::learned::a_start_begins_with_what_the_last_process_has_learned",
        ],
    ),
    (
        "A log that cannot be written costs its lines only",
        &["promises::logs::a_log_that_cannot_be_written_costs_nothing_but_its_lines"],
    ),
    (
        "In a program of your own, make sure that the subscriber neither panics nor waits",
        &["promises::deaths::a_subscriber_that_panics_for_a_while_ends_nothing"],
    ),
    (
        "Nothing keeps serving a frozen view in silence.",
        &["promises::deaths::a_balancer_whose_discovery_panics_says_so_and_goes_on"],
    ),
    (
        "What ends or panics in the services for Pingora is started again",
        &[
            "promises::deaths::a_balancer_whose_discovery_panics_says_so_and_goes_on",
            "promises::deaths::a_live_load_balancer_whose_discovery_panics_goes_on",
            "promises::deaths::a_stock_load_balancer_whose_discovery_panics_goes_on",
            "promises::deaths::health_checks_that_panic_go_on_and_the_view_too",
            "promises::deaths::a_run_that_panics_is_over_for_its_handles_and_can_be_run_again",
            "promises::deaths::a_port_that_is_taken_is_an_error_and_an_exit",
            "promises::deaths::a_port_that_is_taken_later_is_an_error_and_an_exit_too",
        ],
    ),
    (
        "One bad entry harms nobody: it is skipped, counted and logged once for each reason.",
        &[
            "promises::fields::entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once",
            "cluster::discovery::bad_entries_are_skipped_and_the_others_are_served",
        ],
    ),
    (
        "So is one that is too large, or points to an address or port that is not allowed.",
        &[
            "promises::fields::entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once",
        ],
    ),
    // "TLS" and "HTTP/2 and gRPC", in "At the edge".
    (
        "A client gets the first certificate that is for the name it asks for",
        &["promises::tls::certificates_are_chosen_by_name_and_reloaded_but_bad_ones_are_not"],
    ),
    (
        "A backend is never spoken to without a name to verify its certificate by",
        &[
            "promises::tls::backends_are_verified_by_name",
            "promises::tls::a_node_says_how_it_is_spoken_to_but_cannot_switch_tls_off",
        ],
    ),
    (
        "The `grpc-status` of a call is its outcome",
        &["promises::grpc::the_status_of_a_call_is_its_outcome"],
    ),
    (
        "What the proxy answers itself is a status of gRPC",
        &["promises::grpc::what_the_proxy_says_itself_is_a_status_too"],
    ),
    (
        "Lines go through a bounded queue to a thread of their own, so a request never waits",
        &["promises::access_log::a_log_that_cannot_be_written_costs_only_its_lines"],
    ),
    // "How it ends", in "At the edge".
    (
        "SIGTERM turns readiness off, and connections are still accepted",
        &[
            "promises::shutdown::at_sigterm_it_says_so_goes_on_accepting_and_ends_when_nothing_is_in_flight",
        ],
    ),
    (
        "The process ends as soon as nothing is in flight",
        &[
            "promises::shutdown::an_idle_process_ends_after_the_delay_and_at_ctrl_c_at_once",
            "promises::shutdown::the_grace_period_and_a_second_signal_end_it_with_a_request_in_flight",
            "promises::shutdown::as_the_first_process_of_a_container_it_ends_all_the_same",
            "promises::shutdown::a_worker_ends_within_its_grace_period_whatever_its_clients_do",
        ],
    ),
    (
        "SIGHUP, SIGUSR1 and SIGUSR2 never end it",
        &[
            "promises::shutdown::sighup_and_sigusr_never_end_a_program",
            "promises::shutdown::a_program_that_waits_for_etcd_survives_sighup_and_ends_at_sigterm",
        ],
    ),
    (
        "SIGQUIT hands the listening sockets over to a successor that is ready",
        &[
            "promises::shutdown::sockets_are_handed_over_without_a_refused_or_waiting_connection",
            "promises::shutdown::without_a_view_of_the_group_nothing_is_handed_over",
            "promises::shutdown::a_successor_that_dies_in_between_costs_nothing",
        ],
    ),
    (
        "What the old one has learned of the backends goes along",
        &["promises::learned::a_successor_begins_with_what_its_predecessor_has_learned"],
    ),
    (
        "A service manager is told",
        &["promises::shutdown::a_service_manager_is_told"],
    ),
    (
        "The process ends with an error if one of its addresses is taken",
        &[
            "promises::listeners::a_further_address_that_is_taken_is_an_error_that_names_its_field",
            "promises::listeners::a_successor_that_cannot_listen_everywhere_takes_nothing_away",
            "promises::shutdown::a_daemon_listens_or_its_start_is_an_error",
            "promises::deaths::a_port_that_is_taken_is_an_error_and_an_exit",
            "promises::deaths::a_port_that_is_taken_later_is_an_error_and_an_exit_too",
        ],
    ),
    // "The settings", in "When etcd is away, slow, or hostile".
    (
        "Each of these is a field of the YAML file",
        &[
            "promises::table::every_field_of_the_yaml_file_is_in_the_table_and_the_other_way_round",
            "proxy::programs::every_field_is_in_every_configuration_file",
        ],
    ),
    (
        "`discovery.status()` says how current the view is",
        &[
            "promises::deaths::a_run_that_panics_is_over_for_its_handles_and_can_be_run_again",
            "cluster::resilience::a_start_without_etcd_is_served_from_the_snapshot",
            "cluster::resilience::when_everything_is_gone_from_etcd_the_pool_is_not",
            "cluster::resilience::a_silent_endpoint_is_left_for_the_next_one_which_is_remembered",
            "cluster::discovery::bad_entries_are_skipped_and_the_others_are_served",
        ],
    ),
    (
        "With six nodes, leases of 2 s and steady traffic",
        &["proxy::outage::an_outage_of_etcd_and_a_mass_expiry_cost_no_request"],
    ),
    // Elsewhere.
    (
        "An etcd that is slow is late, not dead.",
        &[
            "cluster::slow::with_400_to_1_400_ms_each_way_changes_are_late_and_a_lease_is_kept",
            "cluster::slow::with_2_s_each_way_changes_are_late_and_a_lease_is_kept",
        ],
    ),
    (
        "The example `worker` does so on SIGTERM.",
        &["proxy::programs::a_worker_told_to_stop_says_so_finishes_what_it_has_and_leaves"],
    ),
    (
        "While there is no leader, a write waits up to 2 s and then gets 503 with `retry-after`.",
        &[
            "promises::fields::a_write_waits_for_a_leader_for_as_long_as_is_set",
            "proxy::programs::leader_routing_as_the_readme_runs_it",
        ],
    ),
    (
        "A field that does not exist is an error that names it and its line",
        &["proxy::programs::wrong_configurations_are_explained"],
    ),
    (
        "Backends that fail are ejected after four failures in a row",
        &[
            "promises::failing::a_backend_that_fails_gets_next_to_nothing_and_is_back_within_seconds",
            "promises::failing::a_few_that_work_serve_all_requests_however_many_refuse",
            "promises::failing::a_few_that_work_serve_all_requests_while_self_preservation_keeps_the_others",
            "promises::fields::adaptive_turns_away_from_what_fails_and_back",
            "proxy::learning::a_backend_that_answers_5xx_loses_its_traffic_and_gets_it_back",
        ],
    ),
    (
        "it uses a part of them: as many as it has requests for,",
        &["promises::subset::one_of_many_balancers_uses_a_part_and_nobody_notices"],
    ),
    (
        "What changes the group (a node joins, leaves,",
        &["promises::hundreds::each_of_hundreds_of_backends_is_followed"],
    ),
    (
        "Of weights of 1 and 9 the smaller one gets a tenth of the requests",
        &["promises::fields::a_small_static_weight_gets_its_part_of_requests_one_after_the_other"],
    ),
    (
        "A node that drains is not picked.",
        &["proxy::programs::a_worker_told_to_stop_says_so_finishes_what_it_has_and_leaves"],
    ),
    (
        "backends in the same zone come first",
        &["promises::fields::the_own_zone_comes_first"],
    ),
    (
        "w1 leaves, no request fails",
        &["proxy::programs::workers_and_a_load_balancer_as_the_readme_runs_them"],
    ),
    (
        "while backends are away, clients do not connect anew for each request.",
        &["promises::backends::a_client_keeps_its_connection_while_the_backend_fails"],
    ),
    (
        "While a request goes on, as a long upload or a stream of gRPC does, its backend may be silent for `timeouts.tunnel_ms`",
        &[
            "promises::uploads::an_upload_to_a_backend_of_http_2_may_take_longer_than_a_response",
            "promises::uploads::a_stream_of_grpc_may_be_silent_for_longer_than_a_response",
        ],
    ),
    (
        "An `Expect: 100-continue` of a client of HTTP/1 is answered here",
        &["promises::uploads::an_expectation_for_a_backend_of_http_2_is_answered_here"],
    ),
    (
        "The latency of a backend begins with the last byte of the request.",
        &[
            "promises::uploads::the_latency_of_a_backend_begins_with_the_last_byte_and_an_early_answer_counts",
        ],
    ),
    (
        "a request that has none of that goes by its client's address.",
        &["promises::fields::consistent_keeps_a_key_with_its_backend_and_spills_what_is_hot"],
    ),
    (
        "and one that is missing or cannot be read for more than five seconds.",
        &["promises::reload::a_file_that_cannot_be_read_for_long_is_a_refused_one"],
    ),
];

/// A field under `cluster`, or `cluster.etcd`, and the tests in which it makes a difference.
const FIELDS: &[(&str, &[&str])] = &[
    (
        "health_check",
        &[
            "promises::checks::a_node_is_checked_before_it_gets_requests_and_left_out_while_it_is_down",
            "promises::checks::each_kind_of_check_asks_what_it_says",
            "promises::checks::too_few_that_are_well_are_not_used_alone",
        ],
    ),
    (
        "groups",
        &[
            "promises::routes::a_group_and_a_route_have_their_own_times_retries_and_limits",
            "promises::reload::groups_come_and_go_and_one_without_a_view_is_refused",
        ],
    ),
    (
        "routes",
        &[
            "promises::routes::each_request_goes_where_the_first_route_for_it_says",
            "promises::routes::a_split_is_by_weight_and_a_mirror_gets_copies_that_nobody_waits_for",
            "promises::routes::a_group_and_a_route_have_their_own_times_retries_and_limits",
            "promises::routes::a_file_that_cannot_be_meant_is_refused_with_its_line",
        ],
    ),
    (
        "leader.writes",
        &["promises::routes::a_group_and_a_route_send_requests_to_the_leader"],
    ),
    (
        "etcd.endpoints",
        &["promises::away::silence_is_noticed_within_five_seconds_and_the_next_endpoint_is_tried"],
    ),
    (
        "etcd.key_prefix",
        &["promises::fields::a_key_prefix_goes_before_every_key"],
    ),
    (
        "etcd.connect_timeout_ms",
        &["promises::store::an_endpoint_that_says_nothing_is_left_after_the_time_to_connect"],
    ),
    (
        "etcd.request_timeout_ms",
        &["promises::store::a_member_that_does_not_answer_is_left_after_the_time_for_a_request"],
    ),
    (
        "etcd.keep_alive_interval_ms",
        &["promises::store::a_connection_on_which_nothing_is_heard_is_pinged_as_often_as_is_set"],
    ),
    (
        "etcd.silence_timeout_ms",
        &["promises::away::silence_is_noticed_within_five_seconds_and_the_next_endpoint_is_tried"],
    ),
    (
        "etcd.sync_endpoints",
        &["promises::store::the_members_that_etcd_names_are_endpoints_too"],
    ),
    (
        "etcd.shuffle_endpoints",
        &["promises::store::a_fleet_with_one_list_of_endpoints_is_spread_over_them"],
    ),
    (
        "etcd.serializable_fallback",
        &[
            "promises::store::without_a_quorum_it_starts_with_what_one_member_has_if_that_is_asked_for",
        ],
    ),
    (
        "etcd.breaker_failures",
        &["promises::store::after_so_many_failures_etcd_is_asked_after_a_pause_only"],
    ),
    (
        "etcd.breaker_pause_ms",
        &["promises::store::after_so_many_failures_etcd_is_asked_after_a_pause_only"],
    ),
    (
        "etcd.tls",
        &["proxy::programs::workers_and_a_load_balancer_over_tls_with_users"],
    ),
    (
        "etcd.user",
        &["proxy::programs::workers_and_a_load_balancer_over_tls_with_users"],
    ),
    (
        "etcd.password",
        &["promises::store::a_password_in_the_file_is_the_users"],
    ),
    (
        "etcd.password_file",
        &["proxy::programs::workers_and_a_load_balancer_over_tls_with_users"],
    ),
    (
        "etcd.password_env",
        &["proxy::programs::workers_and_a_load_balancer_over_tls_with_users"],
    ),
    (
        "group",
        &["proxy::programs::workers_and_a_load_balancer_as_the_readme_runs_them"],
    ),
    (
        "listen",
        &[
            "promises::deaths::a_port_that_is_taken_is_an_error_and_an_exit",
            "promises::deaths::a_port_that_is_taken_later_is_an_error_and_an_exit_too",
            "promises::deaths::a_process_that_takes_the_sockets_over_listens_on_them",
        ],
    ),
    (
        "further_listeners",
        &[
            "promises::listeners::one_process_redirects_from_its_plain_port_to_the_one_with_tls",
            "promises::listeners::all_listeners_are_handed_over_without_a_refused_connection",
        ],
    ),
    (
        "filter",
        &[
            "promises::fields::entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once",
        ],
    ),
    (
        "allowed_networks",
        &[
            "promises::fields::entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once",
        ],
    ),
    (
        "allowed_ports",
        &[
            "promises::fields::entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once",
        ],
    ),
    (
        "limits",
        &[
            "promises::fields::entries_that_are_bad_too_large_or_not_allowed_are_skipped_and_told_once",
        ],
    ),
    (
        "self_preservation",
        &["promises::fields::a_mass_expiry_does_not_empty_the_pool_while_requests_succeed"],
    ),
    (
        "snapshot",
        &[
            "promises::snapshot::the_snapshot_is_there_within_a_second_and_serves_a_start_without_etcd",
        ],
    ),
    (
        "publish_interval_ms",
        &["promises::fields::updates_of_the_view_keep_their_distance"],
    ),
    (
        "policy",
        &[
            "promises::fields::round_robin_random_and_candidates_keep_to_static_weights",
            "promises::fields::headroom_follows_what_is_reported",
            "promises::fields::adaptive_turns_away_from_what_fails_and_back",
            "promises::fields::consistent_keeps_a_key_with_its_backend_and_spills_what_is_hot",
        ],
    ),
    (
        "candidates",
        &["promises::fields::round_robin_random_and_candidates_keep_to_static_weights"],
    ),
    (
        "adaptive",
        &[
            "promises::fields::adaptive_turns_away_from_what_fails_and_back",
            "promises::learned::latencies_that_are_small_enough_move_no_weights",
        ],
    ),
    (
        "headroom",
        &["promises::fields::headroom_follows_what_is_reported"],
    ),
    (
        "hash_on",
        &["promises::fields::consistent_keeps_a_key_with_its_backend_and_spills_what_is_hot"],
    ),
    (
        "consistent",
        &["promises::fields::consistent_keeps_a_key_with_its_backend_and_spills_what_is_hot"],
    ),
    ("zone", &["promises::fields::the_own_zone_comes_first"]),
    ("zone_of", &["promises::fields::the_own_zone_comes_first"]),
    (
        "zones",
        &[
            "promises::fields::the_own_zone_comes_first",
            "promises::fields::no_traffic_leaves_a_zone_for_a_rise_of_latency_that_does_not_count",
        ],
    ),
    (
        "load_reports",
        &["promises::load_reports::they_are_taken_and_not_passed_on"],
    ),
    (
        "load_reports_to_clients",
        &["promises::load_reports::they_are_taken_and_not_passed_on"],
    ),
    (
        "load_report_format",
        &["promises::load_reports::an_inference_server_is_balanced_by_its_queue"],
    ),
    (
        "load_report_metrics",
        &["promises::load_reports::an_inference_server_is_balanced_by_its_queue"],
    ),
    (
        "default_port",
        &["promises::fields::tries_time_outs_and_the_default_port"],
    ),
    (
        "retries",
        &["promises::fields::tries_time_outs_and_the_default_port"],
    ),
    (
        "retry.on_status",
        &["promises::retries::a_status_that_is_listed_is_tried_elsewhere"],
    ),
    (
        "retry.on_timeout",
        &["promises::retries::one_slow_request_is_one_request"],
    ),
    (
        "retry.budget",
        &["promises::retries::retries_are_limited_to_a_part_of_all_requests"],
    ),
    (
        "retry.least_per_second",
        &["promises::retries::retries_are_limited_to_a_part_of_all_requests"],
    ),
    (
        "timeouts.client_header_ms",
        &["promises::clients::a_head_has_to_arrive_as_a_whole_in_its_time_for_each_request"],
    ),
    (
        "timeouts.client_body_ms",
        &["promises::clients::a_stalled_body_is_the_clients_fault"],
    ),
    (
        "timeouts.client_idle_ms",
        &["promises::clients::a_connection_without_requests_is_closed_after_its_time"],
    ),
    (
        "timeouts.client_write_ms",
        &["promises::clients::a_client_that_does_not_read_is_given_up"],
    ),
    (
        "timeouts.client_drain_ms",
        &["promises::clients::a_body_that_nobody_wants_is_read_for_its_time"],
    ),
    (
        "timeouts.tunnel_ms",
        &[
            "promises::clients::a_tunnel_may_be_silent_for_longer_than_a_response",
            "promises::kept::a_tunnel_lives_while_one_side_writes",
            "promises::uploads::a_stream_of_grpc_may_be_silent_for_longer_than_a_response",
        ],
    ),
    (
        "timeouts.connect_ms",
        &[
            "promises::fields::tries_time_outs_and_the_default_port",
            "promises::retries::a_connection_is_made_though_its_first_packet_is_lost",
        ],
    ),
    (
        "timeouts.response_ms",
        &[
            "promises::fields::tries_time_outs_and_the_default_port",
            "promises::kept::an_upload_may_take_longer_than_a_backend_may_be_silent",
        ],
    ),
    (
        "timeouts.read_ms",
        &["promises::waits::a_response_has_a_time_to_begin_and_another_one_to_go_on"],
    ),
    (
        "timeouts.pool_idle_ms",
        &[
            "promises::clients::idle_connections_to_backends_end_before_the_backend_ends_them",
            "promises::kept::idle_connections_that_the_backend_has_closed_are_not_left_half_open",
            "promises::kept::a_connection_is_used_again_exactly_if_both_messages_are_complete_and_nobody_ends_it",
        ],
    ),
    (
        "timeouts.tcp_user_timeout_ms",
        &["promises::retries::a_network_that_drops_packets_in_silence_costs_seconds"],
    ),
    (
        "timeouts.request_ms",
        &[
            "promises::clients::a_request_has_a_time_for_all_of_it",
            "promises::waits::a_request_ends_with_its_time_though_its_backend_has_just_sent_something",
        ],
    ),
    (
        "timeouts.handshake_ms",
        &["promises::tls::a_backend_that_does_not_go_on_with_a_handshake_is_left"],
    ),
    (
        "tls",
        &[
            "promises::tls::certificates_are_chosen_by_name_and_reloaded_but_bad_ones_are_not",
            "promises::tls::clients_show_certificates_and_backends_get_them",
            "promises::tls::a_proxy_header_comes_before_tls_and_a_handshake_has_its_time",
            "promises::tls::files_that_cannot_be_used_at_the_start_are_named",
        ],
    ),
    (
        "backends.protocol",
        &[
            "promises::grpc::calls_streams_deadlines_and_cancellation_pass_through",
            "promises::tls::backends_are_verified_by_name",
            "promises::tls::grpc_over_tls_at_both_ends",
        ],
    ),
    (
        "backends.protocol_of_node",
        &["promises::tls::a_node_says_how_it_is_spoken_to_but_cannot_switch_tls_off"],
    ),
    (
        "backends.server_name",
        &["promises::tls::backends_are_verified_by_name"],
    ),
    (
        "backends.ca_file",
        &["promises::tls::backends_are_verified_by_name"],
    ),
    (
        "backends.cert_file",
        &["promises::tls::backends_are_verified_by_name"],
    ),
    (
        "backends.key_file",
        &["promises::tls::backends_are_verified_by_name"],
    ),
    (
        "backends.streams",
        &[
            "promises::grpc::many_calls_share_connections_and_large_messages_pass",
            "promises::grpc::a_connection_has_as_many_calls_at_one_time_as_is_set",
        ],
    ),
    (
        "clients.connections",
        &["promises::clients::connections_are_limited_in_all_and_per_client"],
    ),
    (
        "clients.connections_per_client",
        &["promises::clients::connections_are_limited_in_all_and_per_client"],
    ),
    (
        "clients.requests_per_connection",
        &["promises::clients::a_connection_ends_after_as_many_requests_as_are_set"],
    ),
    (
        "clients.head_bytes",
        &["promises::clients::heads_and_bodies_are_limited"],
    ),
    (
        "clients.headers",
        &["promises::clients::heads_and_bodies_are_limited"],
    ),
    (
        "clients.body_bytes",
        &["promises::clients::heads_and_bodies_are_limited"],
    ),
    (
        "clients.least_rate",
        &["promises::clients::a_client_that_does_not_read_is_given_up"],
    ),
    (
        "clients.h2c",
        &["promises::clients::http_2_without_tls_is_spoken_to_those_who_begin_with_it"],
    ),
    (
        "clients.upgrade",
        &["promises::overload::protocols_are_passed_on_as_is_set_and_others_are_refused"],
    ),
    (
        "overload.max_in_flight",
        &["promises::overload::requests_beyond_the_limit_wait_and_then_get_503"],
    ),
    (
        "overload.max_in_flight_per_node",
        &[
            "promises::overload::a_backend_gets_no_more_requests_at_a_time_than_it_may",
            "promises::leader::writes_count_as_in_flight_at_the_leader",
        ],
    ),
    (
        "overload.queue",
        &["promises::overload::requests_beyond_the_limit_wait_and_then_get_503"],
    ),
    (
        "overload.queue_timeout_ms",
        &["promises::overload::requests_beyond_the_limit_wait_and_then_get_503"],
    ),
    (
        "overload.retry_after_most_ms",
        &["promises::overload::a_backend_that_asks_for_a_pause_gets_one_within_bounds"],
    ),
    (
        "leader.paths",
        &[
            "promises::leader::everything_but_safe_methods_goes_to_the_leader_and_so_do_paths_and_tunnels",
        ],
    ),
    (
        "leader.read_your_writes_ms",
        &["promises::leader::a_client_reads_its_own_writes_for_as_long_as_is_set"],
    ),
    (
        "sticky_cookie",
        &["promises::overload::a_sticky_cookie_names_the_node_and_holds_while_it_serves"],
    ),
    (
        "clients.forwarded",
        &["promises::access_log::a_trace_is_passed_on_or_begun_and_forwarded_is_sent_on_wish"],
    ),
    (
        "registry",
        &[
            "promises::registries::http_fleets_of_other_registries_are_served_as_they_are",
            "promises::registries::grpc_fleets_of_other_registries_are_spoken_to_in_grpc",
            "promises::registries::an_entry_that_cannot_be_read_is_named_and_harms_no_other",
        ],
    ),
    (
        "further_registries",
        &["promises::registries::a_fleet_moves_from_one_registry_to_another"],
    ),
    (
        "name_servers",
        &["promises::registries::host_names_are_followed"],
    ),
    (
        "opentelemetry",
        &[
            "promises::spans::each_request_is_a_span_with_its_node_and_the_backend_continues_it",
            "promises::spans::a_trusted_proxy_says_which_requests_have_a_span_and_chance_does_otherwise",
            "promises::spans::a_collector_that_is_away_costs_one_line_and_no_request",
            "promises::spans::the_last_spans_are_sent_over_tls_before_the_process_ends",
        ],
    ),
    (
        "admin",
        &[
            "promises::page::the_page_shows_nodes_load_events_and_that_etcd_is_away",
            "promises::page::the_page_is_for_its_own_names_and_only_reads",
            "promises::page::metrics_are_those_of_the_requests_and_prometheus_reads_them",
        ],
    ),
    (
        "traceparent",
        &["promises::access_log::a_trace_is_passed_on_or_begun_and_forwarded_is_sent_on_wish"],
    ),
    (
        "traceparent_sampled",
        &["promises::access_log::a_trace_is_passed_on_or_begun_and_forwarded_is_sent_on_wish"],
    ),
    (
        "access_log",
        &[
            "promises::access_log::what_has_failed_has_a_line_whatever_its_status_is",
            "promises::access_log::each_request_has_a_line_that_says_what_happened",
            "promises::access_log::lines_are_combined_sampled_and_written_before_the_end",
            "promises::access_log::a_log_that_cannot_be_written_costs_only_its_lines",
        ],
    ),
    (
        "clients.half_closed",
        &["promises::rfc::a_client_that_ends_its_side_is_served_if_that_is_set"],
    ),
    (
        "clients.ready_path",
        &[
            "promises::shutdown::at_sigterm_it_says_so_goes_on_accepting_and_ends_when_nothing_is_in_flight",
        ],
    ),
    (
        "clients.trusted_proxies",
        &["promises::headers::backends_learn_who_the_client_is_from_trusted_proxies_only"],
    ),
    (
        "clients.proxy_protocol",
        &[
            "promises::headers::a_proxy_header_names_the_client_if_it_comes_from_whom_it_is_expected",
        ],
    ),
    (
        "clients.proxy_protocol_timeout_ms",
        &[
            "promises::headers::a_proxy_header_names_the_client_if_it_comes_from_whom_it_is_expected",
        ],
    ),
    (
        "ready_timeout_ms",
        &[
            "promises::away::without_etcd_it_answers_after_the_time_to_be_ready_and_asks_now_and_then",
        ],
    ),
    (
        "drain_delay_ms",
        &[
            "promises::shutdown::an_idle_process_ends_after_the_delay_and_at_ctrl_c_at_once",
            "promises::shutdown::at_sigterm_it_says_so_goes_on_accepting_and_ends_when_nothing_is_in_flight",
        ],
    ),
    (
        "leader_wait_ms",
        &["promises::fields::a_write_waits_for_a_leader_for_as_long_as_is_set"],
    ),
];

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Without line breaks and stress.
fn flat(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    words.join(" ").replace("**", "")
}

/// The points of a list.
fn points(section: &str) -> Vec<String> {
    let mut points: Vec<String> = Vec::new();
    for line in section.lines() {
        if let Some(point) = line.strip_prefix("- ") {
            points.push(point.to_owned());
        } else if let Some(more) = line.strip_prefix("  ") {
            points
                .last_mut()
                .expect("a point")
                .push_str(&format!(" {more}"));
        } else if !points.is_empty() && !line.is_empty() {
            break;
        }
    }
    points
}

/// What is not an example.
fn prose(section: &str) -> Vec<String> {
    let parts = section.split("```").step_by(2);
    let paragraphs = parts.flat_map(|part| part.split("\n\n"));
    let texts = paragraphs.map(str::trim).filter(|text| !text.is_empty());
    texts.map(str::to_owned).collect()
}

fn sentences(text: &str) -> Vec<String> {
    let text = flat(text);
    let ends = text.match_indices(". ").map(|(at, _)| at + 1);
    let mut from = 0;
    let cut = |to| {
        let sentence = text[from..to].trim().to_owned();
        from = to;
        sentence
    };
    ends.chain([text.len()]).map(cut).collect()
}

/// A section of a file, without its title.
fn section(path: &str, title: &str) -> String {
    let text = read(path);
    let (_, section) = text.split_once(&format!("## {title}\n")).expect(title);
    let (section, _) = section.split_once("\n##").expect("what follows");
    section.to_owned()
}

/// What the two sections say, sentence by sentence.
fn promised() -> Vec<String> {
    let points = points(&section("README.md", "What it promises"));
    let settings = prose(&section("src/guide/when_etcd_is_away.md", "The settings"));
    let texts = [points, settings].concat();
    texts.iter().flat_map(|text| sentences(text)).collect()
}

#[test]
fn every_promise_of_the_readme_is_in_the_table_and_the_other_way_round() {
    let promised = promised();
    assert!(promised.len() > 10, "{promised:?}");
    for sentence in &promised {
        let is_shown = PROMISES.iter().any(|(text, _)| sentence.starts_with(text));
        assert!(is_shown, "no test is named for: {sentence}");
    }
    let texts: Vec<_> = TEXTS.iter().map(|path| flat(&read(path))).collect();
    for (promise, _) in PROMISES {
        let is_made = texts.iter().any(|text| text.contains(promise));
        assert!(is_made, "neither README nor guide says: {promise}");
    }
}

/// The sections whose fields are in the table one by one.
const SECTIONS: [&str; 7] = [
    "etcd", "retry", "timeouts", "backends", "clients", "overload", "leader",
];

#[test]
fn every_field_of_the_yaml_file_is_in_the_table_and_the_other_way_round() {
    let yaml = read("config/load_balancer.yaml");
    let (_, cluster) = yaml.split_once("\ncluster:\n").expect("the section");
    let mut fields = BTreeSet::new();
    let mut section = String::new();
    for line in cluster.lines() {
        let indent = line.len() - line.trim_start().len();
        let Some((name, _)) = line.trim_start().split_once(':') else {
            continue;
        };
        if name.starts_with(['#', '-']) {
            continue;
        }
        match indent {
            2 => {
                section = name.to_owned();
                if !SECTIONS.contains(&name) {
                    fields.insert(name.to_owned());
                }
            }
            4 if SECTIONS.contains(&&*section) => {
                fields.insert(format!("{section}.{name}"));
            }
            _ => {}
        }
    }
    let shown: BTreeSet<_> = FIELDS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(fields, shown);
    // And every policy there is, in the tests that are named for it.
    let (_, tests) = FIELDS.iter().find(|(name, _)| *name == "policy").unwrap();
    let tests = tests.join(" ");
    for policy in [
        "adaptive",
        "headroom",
        "round_robin",
        "random",
        "consistent",
    ] {
        assert!(yaml.contains(&format!("  #   {policy} ")), "{policy}");
        assert!(tests.contains(policy), "{policy}");
    }
}

#[test]
fn every_test_that_the_table_names_is_there() {
    for (promise, tests) in PROMISES.iter().chain(FIELDS) {
        assert!(!tests.is_empty(), "{promise}");
        for test in *tests {
            let parts: Vec<_> = test.split("::").collect();
            let [krate, module, name] = parts[..] else {
                panic!("{test} is no crate::module::test");
            };
            let source = read(&format!("tests/{krate}/{module}.rs"));
            let main = read(&format!("tests/{krate}/main.rs"));
            assert!(main.contains(&format!("mod {module};")), "{test}");
            let before = source.split_once(&format!("fn {name}()"));
            let (before, _) = before.unwrap_or_else(|| panic!("{test} does not exist"));
            let attributes: Vec<_> = before.lines().rev().take(4).collect();
            let has = |words: &str| attributes.iter().any(|line| line.contains(words));
            assert!(has("#[test]") || has("#[tokio::test"), "{test} is no test");
            assert!(!has("#[ignore"), "{test} is not run");
        }
    }
}
