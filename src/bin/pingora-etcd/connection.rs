//! Which etcd, and which group.

use std::path::PathBuf;

use clap::Args;
use pingora_etcd::config::{self, ClusterConfig, Given};
use pingora_etcd::store::{Credentials, Password, TlsOptions};
use pingora_etcd::{Cluster, ClusterError, EtcdOptions, Operator, ServiceDiscovery};

const GROUP: &str = "workers";
const PASSWORD: &str = "ETCD_PASSWORD";
const ENDPOINT: &str = "http://127.0.0.1:2379";

/// Each option overrides the file.
#[derive(Args)]
pub struct Connection {
    /// Take what is not given here from the section `cluster` of this file.
    #[arg(long, short, env = "PINGORA_ETCD_CONF", value_name = "FILE")]
    conf: Option<PathBuf>,
    /// The group. Default: that of the file, or `workers`.
    #[arg(long, short, env = "PINGORA_ETCD_GROUP")]
    group: Option<String>,
    /// The endpoints of etcd. Default: those of the file, or <http://127.0.0.1:2379>.
    #[arg(
        long,
        short,
        env = "ETCD_ENDPOINTS",
        value_delimiter = ',',
        value_name = "URL"
    )]
    endpoints: Vec<String>,
    /// The prefix of all keys.
    #[arg(long, env = "PINGORA_ETCD_KEY_PREFIX", value_name = "PREFIX")]
    key_prefix: Option<String>,
    /// The CAs that may have signed etcd's certificate. Default: those of the system.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The client certificate to present to etcd.
    #[arg(long, requires = "key", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// The private key of the client certificate.
    #[arg(long, requires = "cert", value_name = "FILE")]
    key: Option<PathBuf>,
    /// The etcd user. The password is in --password-file, or in the variable `ETCD_PASSWORD`.
    #[arg(long, env = "ETCD_USER")]
    user: Option<String>,
    /// The file that contains the password.
    #[arg(long, requires = "user", value_name = "FILE")]
    password_file: Option<PathBuf>,
}

/// A connection to etcd, and the name of a group.
pub struct Target {
    pub etcd: EtcdOptions,
    pub group: String,
    /// Where its nodes are, if the file says it.
    places: Option<Box<ClusterConfig>>,
    /// Those that the file names for passwords.
    password_variables: Vec<String>,
}

impl Connection {
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn target(&self) -> Result<Target, ClusterError> {
        let file = self.conf.as_ref().map(config::load).transpose()?;
        let file = file.map(|(cluster, _)| cluster);
        let (mut etcd, mut group) = match &file {
            Some(file) => (file.etcd.clone(), file.group.clone()),
            None => (EtcdOptions::new([ENDPOINT]), GROUP.to_owned()),
        };
        if !self.endpoints.is_empty() {
            self.endpoints.clone_into(&mut etcd.endpoints);
        }
        if let Some(prefix) = &self.key_prefix {
            etcd = etcd.key_prefix(prefix);
        }
        if self.ca.is_some() || self.cert.is_some() {
            let of_file = etcd.tls.take().unwrap_or_default();
            etcd = etcd.tls(self.tls(of_file));
        }
        if let Some(user) = &self.user {
            // Never as an argument, because those are visible to everybody on the machine.
            let password = match &self.password_file {
                Some(file) => Password::File(file.clone()),
                None => Password::Env(PASSWORD.to_owned()),
            };
            etcd = etcd.credentials(Credentials::new(user, password));
        }
        if let Some(given) = &self.group {
            given.clone_into(&mut group);
        }
        let places = file.and_then(|file| {
            let names = file.groups.keys().map(String::as_str);
            // The group of the section itself first: two may have one name in etcd, in different registries.
            let mut all = std::iter::once(config::DEFAULT_GROUP)
                .chain(names)
                .filter_map(|name| file.of_group(name));
            let found = all.find(|of_group| of_group.group == group).map(Box::new);
            // The page and the metrics call it as the file does.
            found.or_else(|| file.of_group(&group).map(Box::new))
        });
        if let Some(place) = &places {
            group.clone_from(&place.group);
        }
        let text = self.conf.as_ref().map(std::fs::read_to_string);
        Ok(Target {
            etcd,
            group,
            places,
            password_variables: match text {
                Some(Ok(text)) => password_variables(&text),
                _ => Vec::new(),
            },
        })
    }

    /// What is given, in place of what the file says of the same.
    fn tls(&self, mut tls: TlsOptions) -> TlsOptions {
        if let Some(file) = &self.ca {
            tls = tls.ca_file(file);
        }
        if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
            tls = tls.identity(cert, key);
        }
        tls
    }
}

/// The variables that a file names for etcd's password.
fn password_variables(text: &str) -> Vec<String> {
    let given = config::given(text, "the file").unwrap_or_default();
    let text_of = |given: &Given| given.value.as_str().unwrap_or_default().to_owned();
    let names = given.iter().flat_map(|given| match &*given.field {
        "cluster.etcd.password_env" => vec![text_of(given)],
        "cluster.etcd.password" => {
            let text = text_of(given);
            let names = text.split("${").skip(1);
            let names = names.filter_map(|rest| rest.split(['}', ':']).next());
            names.map(|name| name.trim().to_owned()).collect()
        }
        _ => Vec::new(),
    });
    names.collect()
}

impl Target {
    /// The variables that may contain the password.
    pub fn secrets(&self) -> Vec<String> {
        let mut names = vec![PASSWORD.to_owned()];
        names.extend(self.password_variables.iter().cloned());
        if let Some(credentials) = &self.etcd.credentials
            && let Password::Env(name) = &credentials.password
        {
            names.push(name.clone());
        }
        names
    }

    /// # Errors
    ///
    /// If the name of the group or what the file says of it is wrong.
    pub fn discovery(&self, cluster: &Cluster) -> Result<ServiceDiscovery, ClusterError> {
        match &self.places {
            Some(file) => {
                let mut file = ClusterConfig::clone(file);
                // What runs now is asked for, and nothing is written.
                file.snapshot = None;
                file.discovery_over(cluster)
            }
            None => cluster.discovery(&self.group).try_build(),
        }
    }

    /// # Errors
    ///
    /// If the name of the group is wrong, or its nodes are not this crate's, which operators cannot speak of.
    pub fn operator(&self, cluster: &Cluster) -> Result<Operator, ClusterError> {
        let registry = self.places.as_ref().map(|file| &file.registry);
        if registry.is_some_and(|registry| !registry.is_native()) {
            return Err(ClusterError::InvalidConfig {
                field: "cluster.registry".to_owned(),
                reason: "others write the nodes of this group, so that it has no leader, and nobody can drain, weigh or evict them from here".to_owned(),
            });
        }
        Operator::new(cluster, &self.group)
    }

    /// # Errors
    ///
    /// If the options are wrong. Connects to nothing.
    pub fn cluster(&self) -> Result<Cluster, ClusterError> {
        Cluster::connect(self.etcd.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_passwords_are_found() {
        for (etcd, expected) in [
            ("\n    user: ${USER}\n    password: ${PW}", &["PW"][..]),
            (
                "\n    password:\n      x-${A:-b}-${C} # ${NOT}",
                &["A", "C"],
            ),
            ("\n    password_env: DB_PW", &["DB_PW"]),
            ("\n    password_file: ${HOME}/etcd", &[]),
        ] {
            let file =
                format!("# password: ${{NO}}\ncluster:\n  zone: ${{ZONE}}\n  etcd: {etcd}\n");
            assert_eq!(password_variables(&file), expected, "{file}");
        }
    }
}
