//! `agent_mib`: the size of `pika-guest`, static and stripped, as it goes into every image.

use anyhow::Context as _;

use crate::figure::{Figure, Limit};
use crate::setting::Setting;

const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn measure(setting: &Setting) -> anyhow::Result<Vec<Figure>> {
    let agent = &setting.agent;
    let bytes = std::fs::metadata(agent).with_context(|| format!("reading {}", agent.display()))?.len();
    // Exact: a program has far fewer bytes than 2^53.
    #[allow(clippy::cast_precision_loss)]
    let mib = bytes as f64 / MIB;
    Ok(vec![Figure::limited("agent_mib", mib, "MiB", Limit::AtMost(1.75))])
}
