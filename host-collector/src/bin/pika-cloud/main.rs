//! `pika-cloud`: runs workloads in Incus instances. A thin consumer of the library.

mod args;
mod bake;
mod doctor;
mod exit;
mod inspect;
mod print;
mod reconcile;
mod run;
mod show;

use std::process::ExitCode;

use clap::Parser as _;
use pika_host_collector::Cloud;

use args::{Args, Command};
use exit::Failure;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return exit::of_usage(&error),
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("PIKA_CLOUD_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .without_time()
        .with_target(false)
        .with_ansi(print::is_fancy())
        .init();
    // One for what is printed, which a reader may hold up, and at least one for what must not wait for it.
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8));
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::of_failure(&Failure::Other(format!("no threads can be had: {error}"))),
    };
    let ended = runtime.block_on(dispatch(args));
    // What still runs beside a finished command, such as a read of standard input, must not keep it from ending.
    runtime.shutdown_background();
    match ended {
        Ok(code) => code,
        Err(failure) => exit::of_failure(&failure),
    }
}

async fn dispatch(args: Args) -> Result<ExitCode, Failure> {
    let connect = || -> Result<Cloud, Failure> { Ok(Cloud::connect(&args.config()?)?) };
    match &args.command {
        Command::Run(run) => run::run(&connect()?, run, args.json).await,
        Command::Ensure { spec, again } => run::ensure(&connect()?, spec, *again, args.json).await,
        Command::Watch { id } => run::watch(&connect()?, id, args.json).await,
        Command::Logs { id, follow } => show::logs(&connect()?, id, *follow).await,
        Command::Inspect { id } => inspect::inspect(&connect()?, id, args.json).await,
        Command::List => inspect::list(&connect()?, args.json),
        Command::Collect { id, output } => {
            connect()?.collect(id, output)?;
            print::note(&format!("outputs of {id} are in {}", output.display()));
            Ok(ExitCode::SUCCESS)
        }
        Command::Cancel { id } => {
            connect()?.cancel(id).await?;
            print::note(&format!("{id} is ended; `pika-cloud inspect {id}` tells how"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Stop { id } => {
            connect()?.stop(id).await?;
            print::note(&format!("{id} is stopped; its journal and outputs stay in the state dir"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Destroy { id } => {
            connect()?.destroy(id).await?;
            print::note(&format!("{id} is destroyed; its journal and outputs stay in the state dir"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Bake(order) => bake::bake(&connect()?, order, args.json).await,
        Command::Reconcile(options) => reconcile::reconcile(&connect()?, options, args.json).await,
        Command::Doctor => doctor::doctor(&args).await,
        Command::Schema { name } => inspect::schema(name.as_deref()),
        Command::Completions { shell } => {
            args::completions(*shell);
            Ok(ExitCode::SUCCESS)
        }
    }
}
