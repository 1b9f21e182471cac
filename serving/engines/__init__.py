"""Model servers as processes: started, watched until tokens flow, ended with their whole tree."""
