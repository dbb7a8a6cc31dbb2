//! The lists of runs and benches in `tests/lab/Cargo.toml`.

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{cli::GuestArgs, project::Project};

/// The place where a test program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In a guest.
    #[default]
    Guest,
    /// On the host, where it calls the lab itself.
    Host,
}

/// The kernels with which a test program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum With {
    /// With all; takes turns.
    #[default]
    Any,
    /// With all; takes no turns on the newest supported kernel and on the debug kernel.
    Each,
    /// With a distribution's kernel only.
    Stock,
    /// With the debug kernel only.
    Debug,
}

/// One run of one test program.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    pub(super) test: String,
    #[serde(default)]
    pub(super) options: Vec<String>,
    #[serde(default, rename = "where")]
    pub(super) place: Place,
    #[serde(default)]
    pub(super) kernel: With,
}

impl Run {
    /// The name in reports, which FILTER matches.
    pub fn name(&self) -> String {
        let mut name = self.test.clone();
        if !self.options.is_empty() {
            name += &format!(" [{}]", self.options.join(" "));
        }
        name
    }
}

/// A bench of the suite.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Listed {
    pub(super) name: String,
    #[serde(default)]
    pub(super) options: Vec<String>,
    #[serde(default, rename = "where")]
    pub(super) place: Room,
}

/// The place where a bench runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Room {
    /// In a guest whose clock counts instructions.
    #[default]
    Guest,
    /// In two joined guests, measured in real time.
    Pair,
}

/// The benches of the suite.
///
/// # Errors If the list is invalid.
pub(super) fn benches(project: &Project) -> Result<Vec<Listed>> {
    let metadata = &project.package_metadata("peerbuf-lab-suite")?["lab"]["bench"];
    Ok(match metadata {
        serde_json::Value::Null => Vec::new(),
        list => serde_json::from_value(list.clone())
            .context("reading [[package.metadata.lab.bench]] in tests/lab/Cargo.toml")?,
    })
}

pub(super) fn list(project: &Project) -> Result<Vec<Run>> {
    let metadata = project.package_metadata("peerbuf-lab-suite")?;
    let runs = metadata["lab"]["run"].clone();
    if runs.is_null() {
        return Ok(Vec::new());
    }
    serde_json::from_value(runs)
        .context("reading [[package.metadata.lab.run]] in tests/lab/Cargo.toml")
}

pub(super) fn guest_args(run: &Run) -> Result<GuestArgs> {
    options(&run.options, &run.name())
}

/// Parses the options of a run or a bench, which are those of `cargo lab run`.
pub(super) fn options(options: &[String], name: &str) -> Result<GuestArgs> {
    use clap::Parser;
    #[derive(Parser)]
    struct Options {
        #[command(flatten)]
        guest: GuestArgs,
    }
    let words = std::iter::once("run").chain(options.iter().map(String::as_str));
    let options = Options::try_parse_from(words)
        .map_err(|e| anyhow::anyhow!("the options of {name:?} in tests/lab/Cargo.toml: {e}"))?;
    Ok(options.guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_reads_from_the_manifest_and_its_options_are_those_of_run() {
        let json = r#"{"test": "t", "options": ["--topology", "lying"], "where": "host"}"#;
        let run: Run = serde_json::from_str(json).unwrap();
        assert_eq!(run.place, Place::Host);
        assert_eq!(run.name(), "t [--topology lying]");
        assert_eq!(
            guest_args(&run).unwrap().topology,
            crate::guest::Topology::Lying
        );
        let wrong = Run {
            options: vec!["--ring".into()],
            ..run
        };
        assert!(
            guest_args(&wrong)
                .unwrap_err()
                .to_string()
                .contains("--ring")
        );
        assert!(serde_json::from_str::<Run>(r#"{"test": "t", "option": []}"#).is_err());
    }
}
