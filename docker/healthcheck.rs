//! Exit code 0 when the process in this container is ready: asks `/readyz` at the port of `ADMIN_ADDR`. The image has no
//! shell and no curl, so it brings this; the standard library is all it needs.

use std::{
    env,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::ExitCode,
    time::Duration,
};

/// Less than what the container's health check gives us.
const BOUND: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match ready() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn ready() -> Result<(), String> {
    let admin = env::var("ADMIN_ADDR").map_err(|_| "ADMIN_ADDR is not set".to_owned())?;
    let admin: SocketAddr = admin.parse().map_err(|_| format!("ADMIN_ADDR is {admin:?}, not an address"))?;
    // It may listen everywhere; we ask from within.
    let address = SocketAddr::from(([127, 0, 0, 1], admin.port()));
    let mut connection = TcpStream::connect_timeout(&address, BOUND).map_err(|e| format!("{address}: {e}"))?;
    connection.set_read_timeout(Some(BOUND)).map_err(|e| e.to_string())?;
    let request = format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).map_err(|e| e.to_string())?;
    let mut answer = Vec::new();
    connection.take(4096).read_to_end(&mut answer).map_err(|e| e.to_string())?;
    let answer = String::from_utf8_lossy(&answer);
    if answer.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(answer.into_owned()) }
}
