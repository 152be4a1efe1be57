use super::*;
use proptest::prelude::*;
use serde_json::json;

#[test]
fn both_forms_of_the_format_are_read() {
    let text = "TEXT cpu_utilization=0.3,mem_utilization=0.5,application_utilization=0.7,\
                rps_fractional=10,eps=0.1,named_metrics.queue_depth=12";
    let report = LoadReport::parse(text).unwrap();
    assert_eq!((report.cpu, report.application), (Some(0.3), Some(0.7)));
    assert_eq!(
        report.utilization(),
        Some(0.7),
        "the application knows better"
    );
    assert_eq!((report.rps, report.eps), (Some(10.0), Some(0.1)));
    assert_eq!((report.memory, report.queue), (Some(0.5), Some(12.0)));
    assert_eq!((report.in_flight, report.refused), (None, 0));

    let json = r#"JSON {"cpu_utilization": 0.3, "mem_utilization": 0.5, "eps": 1,
        "application_utilization": 0, "request_cost": {"a": 1},
        "named_metrics": {"in_flight": 7, "sampled_at": 1700000000000}}"#;
    let report = LoadReport::parse(json).unwrap();
    assert_eq!(
        report.utilization(),
        Some(0.3),
        "0 means not set in this format"
    );
    assert_eq!(report.in_flight, Some(7.0));
    assert_eq!(report.sampled_at, Some(1_700_000_000_000));
}

#[test]
fn an_invalid_value_is_refused_and_the_others_are_used() {
    let text = "TEXT cpu_utilization=NaN,mem_utilization=-0.5,named_metrics.queue_depth=-1,\
                named_metrics.in_flight=3,nonsense";
    let report = LoadReport::parse(text).unwrap();
    let expected = LoadReport {
        in_flight: Some(3.0),
        refused: 4,
        ..LoadReport::new()
    };
    assert_eq!(report, expected);
    for (value, error) in [
        ("cpu_utilization=1".as_bytes(), LoadReportError::Format),
        (b"TEXT \xff", LoadReportError::Format),
        (&[b' '; 5000], LoadReportError::TooLong(5000)),
    ] {
        assert_eq!(LoadReport::parse(value), Err(error));
    }
    assert!(matches!(
        LoadReport::parse("JSON [1]"),
        Err(LoadReportError::Json(_))
    ));
}

#[test]
fn more_than_1_counts_as_1() {
    let parsed = [
        "TEXT cpu_utilization=1.7,mem_utilization=1.2",
        "TEXT application_utilization=4e9,mem_utilization=1",
        r#"JSON {"cpu_utilization": 1.001, "mem_utilization": 1e300}"#,
    ]
    .map(|text| LoadReport::parse(text).unwrap());
    let metadata = json!({"cpu_usage_percent": 130, "memory_usage_percent": 101.5});
    let by_hand = LoadReport {
        cpu: Some(1.3),
        memory: Some(7.0),
        ..LoadReport::new()
    };
    let others = [LoadReport::from_metadata(&metadata), by_hand.sane()];
    for report in parsed.into_iter().chain(others) {
        let values = (report.utilization(), report.memory, report.refused);
        assert_eq!(values, (Some(1.0), Some(1.0), 0), "{report:?}");
    }
}

#[test]
fn metadata_becomes_a_report() {
    let metadata = json!({"cpu_usage_percent": 45.0, "memory_usage_percent": -1, "queue_depth": 3});
    let report = LoadReport::from_metadata(&metadata);
    assert_eq!(
        (report.cpu, report.memory, report.queue),
        (Some(0.45), None, Some(3.0))
    );
    assert_eq!(report.refused, 1);
}

proptest! {
    /// A value is either refused or within its range.
    #[test]
    fn any_bytes(prefix in "(TEXT |JSON |)", rest in any::<Vec<u8>>()) {
        let mut value = prefix.into_bytes();
        value.extend(rest);
        if let Ok(report) = LoadReport::parse(&value) {
            prop_assert!(report.cpu.is_none_or(|cpu| (0.0..=1.0).contains(&cpu)));
            prop_assert!(report.queue.is_none_or(|queue| (0.0..=1e9).contains(&queue)));
        }
    }

    #[test]
    fn any_numbers(cpu in any::<f64>(), memory in any::<f64>(), in_flight in any::<f64>()) {
        let text = format!("TEXT cpu_utilization={cpu},mem_utilization={memory},named_metrics.in_flight={in_flight}");
        let report = LoadReport::parse(&text).unwrap();
        for value in [report.cpu, report.memory, report.in_flight].into_iter().flatten() {
            prop_assert!((0.0..=1e9).contains(&value));
        }
    }

    /// A report that is written and parsed is the same.
    #[test]
    fn round_trip(cpu in 0.0..=1.0_f64, queue in 0..1000_u32, in_flight in 0..1000_u32, at in 0..2_000_000_000_000_u64) {
        let report = LoadReport {
            cpu: Some(cpu),
            queue: Some(queue.into()),
            in_flight: Some(in_flight.into()),
            rps: Some(f64::from(queue) / 7.0),
            eps: Some(1.5),
            application: Some(1.0 - cpu / 2.0),
            sampled_at: Some(at),
            ..LoadReport::new()
        };
        for form in [LoadReportForm::Text, LoadReportForm::Json, LoadReportForm::Bin] {
            let value = report.to_header(form);
            // Zero is not said in binary.
            let mut expected = report;
            if form == LoadReportForm::Bin {
                expected.cpu = expected.cpu.filter(|it| *it > 0.0);
                expected.rps = expected.rps.filter(|it| *it > 0.0);
            }
            prop_assert_eq!(LoadReport::parse(&value).unwrap(), expected, "{}", value);
        }
    }
}

#[test]
fn both_spellings_and_numbers_as_texts_are_read() {
    let json = r#"JSON {"cpuUtilization": "0.25", "memUtilization": 0.5, "applicationUtilization": "0.75",
        "rpsFractional": "12.5", "eps": "NaN", "namedMetrics": {"queue_depth": "3"}, "requestCost": {"x": 1},
        "utilization": null}"#;
    let expected = LoadReport {
        cpu: Some(0.25),
        memory: Some(0.5),
        application: Some(0.75),
        rps: Some(12.5),
        queue: Some(3.0),
        refused: 1,
        ..LoadReport::new()
    };
    assert_eq!(LoadReport::parse(json).unwrap(), expected);
}

/// The example in the description of the format, gRFC A51's and Envoy's tests: made by other programs.
#[test]
fn the_binary_form_of_others_is_read() {
    // cpu_utilization 0.1, rps_fractional 2, named_metrics {foo: 0.1, bar: 0.2}.
    let base64 = "CZqZmZmZmbk/MQAAAAAAAABAQg4KA2ZvbxGamZmZmZm5P0IOCgNiYXIRmpmZmZmZyT8=";
    let names = MetricNames {
        queue_depth: Some("foo".to_owned()),
        mem_utilization: Some("named_metrics.bar".to_owned()),
        ..MetricNames::default()
    };
    let expected = LoadReport {
        cpu: Some(0.1),
        rps: Some(2.0),
        queue: Some(0.1),
        memory: Some(0.2),
        ..LoadReport::new()
    };
    let in_header = LoadReport::parse_with(format!("BIN {base64}"), &names);
    assert_eq!(in_header.unwrap(), expected);
    let mut headers = http::HeaderMap::new();
    assert!(LoadReport::from_headers(&headers, &names).is_none());
    headers.insert(LOAD_REPORT_HEADER, "TEXT eps=1".parse().unwrap());
    for value in [base64, base64.trim_end_matches('=')] {
        headers.insert(LOAD_REPORT_BINARY_HEADER, value.parse().unwrap());
        let read = LoadReport::from_headers(&headers, &names).unwrap();
        assert_eq!(read.unwrap(), expected, "the binary one goes first");
    }
    headers.insert(LOAD_REPORT_BINARY_HEADER, "?".parse().unwrap());
    let read = LoadReport::from_headers(&headers, &names).unwrap();
    assert!(matches!(read, Err(LoadReportError::Binary(_))));
    let read = LoadReport::parse("BIN CQ==");
    assert!(matches!(read, Err(LoadReportError::Binary(_))), "cut off");
}

#[test]
fn a_name_that_is_given_replaces_the_usual_one() {
    let names = MetricNames {
        cpu_utilization: Some("utilization.gpu".to_owned()),
        queue_depth: Some("waiting".to_owned()),
        ..MetricNames::default()
    };
    names.validate("load_report_metrics").unwrap();
    let forms = [
        "TEXT cpu_utilization=0.1, utilization.gpu=0.9, named_metrics.queue_depth=1, named_metrics.waiting=5",
        r#"JSON {"cpu_utilization": 0.1, "utilization": {"gpu": 0.9},
            "named_metrics": {"queue_depth": 1, "waiting": 5, "gpu": 0.5}}"#,
    ];
    for form in forms {
        let report = LoadReport::parse_with(form, &names).unwrap();
        assert_eq!((report.cpu, report.queue), (Some(0.9), Some(5.0)), "{form}");
    }
    for name in ["", "named_metrics.", "a=b", "a,b", "a b"] {
        let names = MetricNames {
            in_flight: Some(name.to_owned()),
            ..MetricNames::default()
        };
        let error = names.validate("load_report_metrics").unwrap_err();
        let error = error.to_string();
        assert!(error.contains("load_report_metrics.in_flight"), "{error}");
    }
}
